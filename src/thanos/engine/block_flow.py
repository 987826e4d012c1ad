"""The data flow inside a block: the dependencies of its layers, and the layers that write into the residual stream.

Both are found by running the block on one sequence; names are not used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from thanos.model.layers import LinearLayer

Run = Callable[[], Tensor]
"""Runs the block on one sequence with its current weights; returns its outputs, (1, T, d)."""

BLOCK_INPUT = ""
"""The name of a residual stream that is the block's own input."""

_TOKENS = 16
"""Number of tokens that are compared: 16 rows of d numbers are not equal by chance."""


# --- layers that depend on each other -------------------------------------------------------------------------------------


def levels(run: Run, layers: Sequence[LinearLayer]) -> dict[str, int]:
    """Return layer name → level. A layer's input depends only on outputs of layers of lower levels.

    Level 0 depends only on the block's input: q, k and v. Each layer on the path adds a level: o, then gate and up, then
    down. Each layer's output is made a leaf of autograd's graph. So the gradient of another layer's input exists only for the
    layers that it depends on directly.

    Corresponding layers of the experts of one mixture have the same level. A layer that the sequence does not reach has the
    level of its counterparts, else the highest. If autograd cannot follow the block, every input is a level of its own, in the
    order of calls.
    """
    keys = _shared_keys(layers)
    trace = _Trace(keys)
    try:
        with torch.enable_grad(), trace.follow(layers):
            run()
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        trace = _Trace(keys, differentiates=False)
        with torch.no_grad(), trace.follow(layers):
            run()
    found = trace.levels
    known = {keys.get(name, name): level for name, level in found.items()}
    last = max(found.values(), default=0)
    return {layer.name: known.get(keys.get(layer.name, layer.name), last) for layer in layers}


@dataclass(slots=True)
class _Trace:
    """The levels of the layers that were called so far.

    Attributes:
        keys: see :func:`_shared_keys`.
        differentiates: whether autograd determines the dependencies.
        levels: layer name → level.
    """

    keys: Mapping[str, str]
    differentiates: bool = True
    levels: dict[str, int] = field(default_factory=dict)
    _of_key: dict[str, int] = field(default_factory=dict)
    _leaves: list[tuple[Tensor, int]] = field(default_factory=list)
    _inputs: list[tuple[Tensor, int]] = field(default_factory=list)

    @contextmanager
    def follow(self, layers: Sequence[LinearLayer]) -> Iterator[None]:
        """While open, determine the levels of ``layers`` as they are called."""

        def enter(name: str) -> Callable[..., None]:
            def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                key = self.keys.get(name, name)
                if key not in self._of_key:
                    self._of_key[key] = self._level(args[0])
                self.levels[name] = self._of_key[key]

            return see

        def leave(name: str) -> Callable[..., Tensor]:
            def see(_: nn.Module, args: Any, output: Tensor) -> Tensor:
                if not self.differentiates:
                    return output
                leaf = output.detach().requires_grad_()
                self._leaves.append((leaf, self.levels[name]))
                return leaf.clone()  # a leaf could not be modified in place

            return see

        with ExitStack() as hooks:
            for layer in layers:
                hooks.enter_context(layer.module.register_forward_pre_hook(enter(layer.name)))
                hooks.enter_context(layer.module.register_forward_hook(leave(layer.name)))
            yield

    def _level(self, inputs: Tensor) -> int:
        for known, level in self._inputs:
            if known is inputs:
                return level
        level = self._after(inputs) if self.differentiates else len(self._inputs)
        self._inputs.append((inputs, level))
        return level

    def _after(self, inputs: Tensor) -> int:
        if not inputs.requires_grad or not self._leaves:
            return 0
        leaves = [leaf for leaf, _ in self._leaves]
        gradients = torch.autograd.grad(inputs.sum(), leaves, retain_graph=True, allow_unused=True)
        found = zip(gradients, self._leaves, strict=True)
        return 1 + max((level for gradient, (_, level) in found if gradient is not None), default=-1)


def _shared_keys(layers: Iterable[LinearLayer]) -> dict[str, str]:
    """Return name of an expert's layer → a key that the corresponding layers of all experts of a mixture share."""
    keys: dict[str, str] = {}
    counts: dict[str, int] = {}
    for layer in layers:
        if layer.expert:
            key = counts.get(layer.expert, 0)
            keys[layer.name], counts[layer.expert] = f"{layer.expert.rpartition('.')[0]} {key}", key + 1
    return keys


# --- layers that write into the residual stream ---------------------------------------------------------------------------


class Stream(NamedTuple):
    """The residual stream to which a layer's output is added, apart from that output.

    Attributes:
        source: name of the module within the block whose input is the stream before the layer, or :data:`BLOCK_INPUT`.
        parallel: full name of the other layer whose output is added in the same sum, if attention and MLP are parallel; else
            empty.
    """

    source: str
    parallel: str = ""


def residual_streams(run: Run, hidden: Tensor, block: nn.Module, layers: Sequence[LinearLayer]) -> dict[str, Stream]:
    """Return, for each layer that writes into the residual stream, the stream that its output is added to.

    A layer writes into it if its output plus a tensor r that was known before equals a later module's input, or the block's
    output. r is the block's input or the input of an earlier module. Two layers write into it together if the sum of their
    outputs and r, in any order, does. A layer whose output is scaled or normalised first, or added to more than one other, is
    not found. ``hidden`` is the block's input, (1, T, d).
    """
    known: list[tuple[str, Tensor]] = [(BLOCK_INPUT, _few(hidden))]
    outputs: dict[str, tuple[int, Tensor]] = {}  # layer → number of tensors known before it ended, its output

    def enter(name: str) -> Callable[..., None]:
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if first is not None and _alike(first, hidden):
                known.append((name, _few(first)))

        return see

    def leave(name: str) -> Callable[..., None]:
        def see(_: nn.Module, args: Any, output: Tensor) -> None:
            if _alike(output, hidden):
                outputs[name] = len(known), _few(output)

        return see

    experts = [layer.module for layer in layers if layer.expert]
    with ExitStack() as hooks, torch.no_grad():
        for name, module in block.named_modules():
            if name and not any(module is expert for expert in experts):
                hooks.enter_context(module.register_forward_pre_hook(enter(name), with_kwargs=True))
        for layer in layers:
            if not layer.expert:
                hooks.enter_context(layer.module.register_forward_hook(leave(layer.name)))
        known.append((BLOCK_INPUT, _few(run())))
    outputs = {name: one for name, one in outputs.items() if one[1].any()}
    found: dict[str, Stream] = {}
    for name, (count, output) in outputs.items():
        with suppress(StopIteration):
            found[name] = Stream(next(_sources(known[:count], known[count:], output)))
    for one, other in combinations([name for name in outputs if name not in found], 2):
        (first, a), (last, b) = outputs[one], outputs[other]
        with suppress(StopIteration):
            source = next(_sources(known[: min(first, last)], known[max(first, last) :], a, b))
            found |= {one: Stream(source, other), other: Stream(source, one)}
    return found


def _sources(before: list[tuple[str, Tensor]], after: list[tuple[str, Tensor]], *outputs: Tensor) -> Iterator[str]:
    """Yield the names of the tensors r in ``before`` whose sum with one or two outputs, in any order, is one of ``after``."""
    for name, stream in before:
        if len(outputs) == 1:
            totals = [stream + outputs[0]]
        else:  # the order of a sum affects its last bits
            a, b = outputs
            totals = [a + b + stream, a + stream + b, b + stream + a]
        if any(torch.equal(total, later) for total in totals for _, later in after):
            yield name


def _alike(states: Tensor, hidden: Tensor) -> bool:
    """Return whether a tensor has a row of the same width for each token; some blocks join the sequences of a batch."""
    return states.numel() == hidden.numel() and states.shape[-1] == hidden.shape[-1]


def _few(states: Tensor) -> Tensor:
    return states.reshape(-1, states.shape[-1])[:_TOKENS].clone()
