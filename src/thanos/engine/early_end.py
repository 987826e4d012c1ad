"""Early end of passes that run only for hooks on some layers: the rest of the block would be discarded."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from thanos.engine.block_calls import stop
from thanos.model.layers import LinearLayer


@contextmanager
def stopping_at(layer: LinearLayer) -> Iterator[Callable[[], None]]:
    """End every pass at the input of ``layer``. Hooks that were registered before still see it.

    The yielded function does nothing: the interface is that of :func:`stopping_after`.
    """
    with layer.module.register_forward_pre_hook(lambda *_: stop()):
        yield lambda: None


@contextmanager
def stopping_after(
    layers: Sequence[LinearLayer], block: Sequence[LinearLayer] = (), calls: list[str] | None = None
) -> Iterator[Callable[[], None]]:
    """Record in the first batch which layer is called last, and end later batches as soon as every input has been seen.

    A later batch ends at the last layer that is the first to read its input. For example, q, k and v share an input. The first
    batch shows which layers do.

    Later batches end early only if the first one called every layer exactly once and no layer belongs to an expert, whose
    calls depend on the tokens. Otherwise another layer with a hook may be called after that point.

    Args:
        layers: the layers that have hooks.
        block: further layers of the block, whose calls are recorded too.
        calls: names of the block's layers in the order of their calls, from an earlier pass; then the first batch ends early
            too, at the last layer. If the list is empty, the first batch fills it.

    Yields:
        A function to call after each batch.
    """
    known = [] if calls is None else calls
    names, called = {layer.name for layer in layers}, list[str]()
    inputs, readers = list[weakref.ref[Tensor]](), set[str]()  # each distinct input, and the layers that read it first
    learned, handles = False, list[Any]()

    def watch(layer: LinearLayer) -> Callable[..., None]:
        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            called.append(layer.name)
            if layer.name in names and not any(one() is args[0] for one in inputs):
                inputs.append(weakref.ref(args[0]))
                readers.add(layer.name)

        return see

    def stop_at_last(wanted: Collection[str]) -> None:
        own = [name for name in known if name in names]
        if own and len(own) == len(names) == len(set(own)) and not any(layer.expert for layer in layers):
            last = next(name for name in reversed(own) if name in wanted)
            module = next(layer.module for layer in layers if layer.name == last)
            handles.append(module.register_forward_pre_hook(lambda *_: stop()))

    def batch_ended() -> None:
        nonlocal learned
        if learned:
            return
        learned = True
        while handles:
            handles.pop().remove()
        if not known:
            known.extend(called)
        stop_at_last(readers)

    for layer in {layer.name: layer for layer in (*layers, *(() if known else block))}.values():
        handles.append(layer.module.register_forward_pre_hook(watch(layer)))
    if known:
        stop_at_last(names)
    try:
        yield batch_ended
    finally:
        for handle in handles:
            handle.remove()
