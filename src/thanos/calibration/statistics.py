"""Statistics of layer inputs, gathered while a block runs: XᵀX in float32, once for each distinct input.

Layers that are handed the very same tensor (q, k and v; gate and up) share one accumulator.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from thanos.errors import NumericsError
from thanos.model.layers import LinearLayer
from thanos.solvers.precision import full_float32

_STATISTICS_BYTES = {"cpu": 4 << 30, "cuda": 16 << 30}
"""Hessians held at once. A block of many experts needs more, and is run once for each part of them instead."""


@dataclass(slots=True)
class InputGroup:
    """The layers that read one input, and its statistics.

    Attributes:
        layers: in the order in which the block calls them.
        hessian: XᵀX, (b, b) float32, on the device of the inputs.
        tokens: rows of X so far.
    """

    layers: list[LinearLayer]
    hessian: Tensor
    tokens: int = 0
    current: weakref.ref[Tensor] | None = field(default=None, repr=False)

    def reads(self, inputs: Tensor) -> bool:
        """Whether these are the inputs that were added last: the very same tensor."""
        return self.current is not None and self.current() is inputs

    def add(self, inputs: Tensor) -> None:
        """Add the tokens of ``inputs`` (..., b)."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        add_gram(self.hessian, rows)
        self.tokens += rows.shape[0]


def empty_group(layers: list[LinearLayer], device: torch.device) -> InputGroup:
    """Return the statistics of layers that have seen nothing."""
    size = layers[0].shape[1]
    return InputGroup(layers, torch.zeros(size, size, dtype=torch.float32, device=device))


_GRAM_ROWS = {"cpu": 256, "cuda": 2048}
"""Rows of XᵀX multiplied at once: what lies below them follows from symmetry, so that about half of a wide matrix is
multiplied; narrower panels would make the products slow."""


def add_gram(hessian: Tensor, rows: Tensor) -> None:
    """Add XᵀX to ``hessian`` (b, b) float32, symmetric, for X = rows (T, b) of any dtype, products exact in float32."""
    sixteen_bit = rows.dtype in (torch.bfloat16, torch.float16) and rows.is_cuda
    rows = rows if sixteen_bit else rows.to(hessian.dtype)
    panel = _GRAM_ROWS.get(rows.device.type, _GRAM_ROWS["cpu"])
    for start in range(0, hessian.shape[0], panel):
        stop = start + panel
        place, left, right = hessian[start:stop, start:], rows[:, start:stop].T, rows[:, start:]
        if sixteen_bit:
            # 16-bit products are exact in float32: the tensor cores add them up there, into the Hessian, without a copy of X.
            torch.addmm(place, left, right, out_dtype=torch.float32, out=place)
        else:
            with full_float32():
                place.addmm_(left, right)
        hessian[stop:, start:stop].copy_(hessian[start:stop, stop:].T)


def plan_passes(layers: Sequence[LinearLayer], budget: int) -> list[list[LinearLayer]]:
    """Divide the layers of a block into runs whose Hessians fit into ``budget`` bytes together.

    What reads one input stays together, since layers of one module are never divided; a single module may exceed the
    budget. Layers of one module and shape, such as an expert's gate and up, are taken to share their input.
    """
    modules: dict[str, list[LinearLayer]] = {}
    for layer in layers:
        modules.setdefault(layer.name.rpartition(".")[0], []).append(layer)
    passes: list[list[LinearLayer]] = [[]]
    filled = 0
    for members in modules.values():
        needed = sum(4 * columns**2 for _, columns in {layer.shape for layer in members})
        if passes[-1] and filled + needed > budget:
            passes.append([])
            filled = 0
        passes[-1] += members
        filled += needed
    return passes


@contextmanager
def gather(layers: Sequence[LinearLayer]) -> Iterator[list[InputGroup]]:
    """While open, accumulate the inputs of ``layers``; the list holds one group per distinct input, in calling order.

    Layers that are never called are in no group.
    """
    groups: list[InputGroup] = []
    group_of: dict[str, InputGroup] = {}

    def hook(layer: LinearLayer) -> Any:
        def see(_: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs = args[0]
            group = group_of.get(layer.name)
            if group is None:
                group = next((g for g in groups if g.reads(inputs) and g.layers[0].shape[1] == layer.shape[1]), None)
                if group is None:
                    group = empty_group([layer], inputs.device)
                    groups.append(group)
                else:
                    group.layers.append(layer)
                group_of[layer.name] = group
            if group.layers[0] is layer:
                group.current = weakref.ref(inputs)
                group.add(inputs)
            elif not group.reads(inputs):
                raise AssertionError(f"{layer.name} shared its input with {group.layers[0].name}, and no longer does")

        return see

    handles = [layer.module.register_forward_pre_hook(hook(layer)) for layer in layers]
    try:
        yield groups
    finally:
        for handle in handles:
            handle.remove()
        for group in groups:
            group.current = None


def check_finite(groups: Sequence[InputGroup]) -> None:
    """Refuse statistics that hold NaN or infinity; the device is asked once for all of them.

    Raises:
        NumericsError: names the first layer that reads the first such input.
    """
    if not groups:
        return
    finite = torch.stack([torch.isfinite(group.hessian.diagonal()).all() for group in groups]).tolist()
    for group, good in zip(groups, finite, strict=True):
        if not good:
            raise NumericsError(
                f"the inputs of {group.layers[0].name} hold NaN or infinity; the checkpoint is damaged or the "
                "activations overflow: try --dtype float32 or bfloat16"
            )


def statistics_budget(device: torch.device) -> int:
    """Return the bytes of Hessians that are held at once."""
    return _STATISTICS_BYTES.get(device.type, _STATISTICS_BYTES["cpu"])
