"""Statistics of layer inputs, gathered while a block runs, once for each distinct input.

Layers that are handed the very same tensor (q, k and v; gate and up) share them. What is gathered follows from what the layers'
methods need to know (:class:`Need`):

    need      over all tokens     over a sample of sequences, for the errors in the records
    GRAM      XᵀX
    NORMS     squared norms       XᵀX     (where that is cheaper than XᵀX over all tokens)
    NOTHING                       XᵀX

The sums are accumulators (:mod:`thanos.calibration.accumulators`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from thanos import registry
from thanos.calibration.accumulators import Accumulator, Gram, SquaredNorms
from thanos.errors import NumericsError
from thanos.model.layers import LinearLayer
from thanos.recipe import LayerRecipe
from thanos.registry import Needs

_STATISTICS_BYTES = {"cpu": 4 << 30, "cuda": 16 << 30}
"""Hessians held at once. A block of many experts needs more, and is run once for each part of them instead."""


class Need(IntEnum):
    """What has to be known about a layer's inputs X, (a, b); each includes those before it."""

    NOTHING = 0
    NORMS = 1
    """The squared norms of the columns, (b,): the diagonal of XᵀX."""
    GRAM = 2
    """XᵀX, (b, b)."""


_OF_METHOD = {Needs.NOTHING: Need.NOTHING, Needs.NORMS: Need.NORMS}
"""What a method needs, as the registry says it, by what is gathered; the factor is made of XᵀX."""


def need_of(settings: LayerRecipe) -> Need:
    """Return what has to be known about the inputs of a layer to prune it."""
    if settings.outlier_rows > 0:  # chosen by their squared output norms, the diagonal of W XᵀX Wᵀ
        return Need.GRAM
    return _OF_METHOD.get(registry.method(settings.method).needs, Need.GRAM)


def need_of_all(settings: Iterable[LayerRecipe], measure_error: bool | None) -> Need:
    """Return what is gathered over all tokens for layers that are observed together.

    Args:
        settings: of the layers.
        measure_error: see :class:`~thanos.recipe.Recipe`.
    """
    return Need.GRAM if measure_error else max(map(need_of, settings), default=Need.NOTHING)


@dataclass(slots=True)
class InputGroup:
    """The layers that read one input, and its statistics.

    Attributes:
        layers: in the order in which the block calls them.
        whole: statistics over all tokens.
        sample: statistics over the tokens of a sample of sequences.
        tokens: rows of X so far.
    """

    layers: list[LinearLayer]
    whole: tuple[Accumulator, ...] = ()
    sample: tuple[Accumulator, ...] = ()
    tokens: int = 0
    current: weakref.ref[Tensor] | None = field(default=None, repr=False)

    @property
    def accumulators(self) -> tuple[Accumulator, ...]:
        """All statistics."""
        return *self.whole, *self.sample

    @property
    def gram(self) -> Gram | None:
        """XᵀX, over all tokens or the sample's; None where it is not gathered."""
        return next((one for one in self.accumulators if isinstance(one, Gram)), None)

    @property
    def norms(self) -> SquaredNorms | None:
        """The squared norms over all tokens; None where they are not gathered for themselves."""
        return next((one for one in self.accumulators if isinstance(one, SquaredNorms)), None)

    @property
    def hessian(self) -> Tensor:
        """XᵀX, (b, b) float32, where it is gathered."""
        assert self.gram is not None
        return self.gram.sums

    def reads(self, inputs: Tensor) -> bool:
        """Whether these are the inputs that were added last: the very same tensor."""
        return self.current is not None and self.current() is inputs

    def add(self, inputs: Tensor, *, sampling: bool = True) -> None:
        """Add the tokens of ``inputs`` (..., b), to the statistics of the sample too while that is ``sampling``."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        for one in self.accumulators if sampling else self.whole:
            one.add(rows)
        self.tokens += rows.shape[0]


def empty_group(
    layers: list[LinearLayer], device: torch.device, need: Need = Need.GRAM, *, sample: bool = True
) -> InputGroup:
    """Return the statistics of layers that have seen nothing.

    Args:
        layers: that read one input.
        device: of the inputs.
        need: what is gathered over all tokens at least.
        sample: also gather XᵀX over a sample, if it is not gathered over all tokens.
    """
    columns = layers[0].shape[1]
    dtype = layers[0].module.get_parameter("weight").dtype
    if need is Need.GRAM or (need is Need.NORMS and not SquaredNorms.suits(columns, dtype, device)):
        return InputGroup(layers, (Gram.empty(columns, device),))
    whole = (SquaredNorms.empty(columns, device),) if need is Need.NORMS else ()
    return InputGroup(layers, whole, (Gram.empty(columns, device),) if sample else ())


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


class Gathered(list[InputGroup]):
    """Groups of layers, one for each distinct input, in calling order; layers that are never called are in none.

    Attributes:
        sampling: whether the statistics of the sample still grow. Whoever runs the block ends that, between two batches.
    """

    sampling: bool = True


@contextmanager
def gather(layers: Sequence[LinearLayer], need: Need = Need.GRAM, *, sample: bool = True) -> Iterator[Gathered]:
    """While open, accumulate the inputs of ``layers``; see :func:`empty_group` for the other arguments."""
    groups = Gathered()
    group_of: dict[str, InputGroup] = {}

    def hook(layer: LinearLayer) -> Any:
        def see(_: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs = args[0]
            group = group_of.get(layer.name)
            if group is None:
                group = next((g for g in groups if g.reads(inputs) and g.layers[0].shape[1] == layer.shape[1]), None)
                if group is None:
                    group = empty_group([layer], inputs.device, need, sample=sample)
                    groups.append(group)
                else:
                    group.layers.append(layer)
                group_of[layer.name] = group
            if group.layers[0] is layer:
                group.current = weakref.ref(inputs)
                group.add(inputs, sampling=groups.sampling)
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
    known = [(group, one) for group in groups for one in group.accumulators]
    if not known:
        return
    finite = torch.stack([torch.isfinite(one.squared_norms()).all() for _, one in known]).tolist()
    for (group, _), good in zip(known, finite, strict=True):
        if not good:
            raise NumericsError(
                f"the inputs of {group.layers[0].name} hold NaN or infinity; the checkpoint is damaged or the "
                "activations overflow: try --dtype float32 or bfloat16"
            )


def statistics_budget(device: torch.device) -> int:
    """Return the bytes of Hessians that are held at once."""
    return _STATISTICS_BYTES.get(device.type, _STATISTICS_BYTES["cpu"])
