"""Early end of passes that run only for hooks on some layers: the rest of the block would be discarded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

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
    """Record in the first batch which layer is called last, and end later batches at its input.

    Later batches end early only if the first one called every layer exactly once and no layer belongs to an expert, whose
    calls depend on the tokens. Otherwise another layer with a hook may be called after that point.

    Args:
        layers: the layers that have hooks.
        block: further layers of the block, whose calls are recorded too.
        calls: names of the block's layers in the order of their calls, from an earlier pass; then the first batch ends early
            too. If the list is empty, the first batch fills it.

    Yields:
        A function to call after each batch.
    """
    known = [] if calls is None else calls
    called: list[str] = []
    watched = {layer.name: layer for layer in (*layers, *block)}.values()
    handles = [
        layer.module.register_forward_pre_hook(lambda *_, layer=layer: called.append(layer.name))
        for layer in (watched if not known else ())
    ]

    def stop_at_last() -> None:
        names = {layer.name for layer in layers}
        own = [name for name in known if name in names]
        if own and len(own) == len(names) == len(set(own)) and not any(layer.expert for layer in layers):
            last = next(layer for layer in layers if layer.name == own[-1])
            handles.append(last.module.register_forward_pre_hook(lambda *_: stop()))

    learned = bool(known)
    if learned:
        stop_at_last()

    def batch_ended() -> None:
        nonlocal learned
        if learned:
            return
        learned = True
        while handles:
            handles.pop().remove()
        known.extend(called)
        stop_at_last()

    try:
        yield batch_ended
    finally:
        for handle in handles:
            handle.remove()
