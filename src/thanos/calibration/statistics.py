"""Statistics of layer inputs, accumulated while a block runs, once for each distinct input.

Layers that receive the same tensor object (q, k and v; gate and up) share its statistics. The needs of the layers' methods
(:class:`Need`) decide which statistics are accumulated:

    need      over all tokens     over a sample of sequences, for the errors in the records
    GRAM      XᵀX
    NORMS     squared norms       XᵀX     (if this is cheaper than XᵀX over all tokens)
    NOTHING                       XᵀX

A layer that is fitted to the dense model's outputs needs products with the dense model's inputs too: :class:`Pairs`.

The sums are accumulators (:mod:`thanos.calibration.accumulators`).
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from thanos import registry
from thanos.calibration.accumulators import Accumulator, CrossGram, Gram, SquaredNorms, Sum
from thanos.errors import NumericsError
from thanos.model.layers import LinearLayer
from thanos.recipe import LayerRecipe
from thanos.registry import Needs

_STATISTICS_BYTES = {"cpu": 4 << 30, "cuda": 16 << 30}
"""Bytes of Hessians held at once, by device type. A block with many experts needs more: it then runs once for each part of its
layers."""


class Need(IntEnum):
    """The statistics that a method needs of a layer's inputs X, (a, b); each need includes those before it."""

    NOTHING = 0
    NORMS = 1
    """The squared norms of the columns, (b,): the diagonal of XᵀX."""
    GRAM = 2
    """XᵀX, (b, b)."""


_OF_METHOD = {Needs.NOTHING: Need.NOTHING, Needs.NORMS: Need.NORMS}
"""The statistics for a method's needs in the registry. All other needs require XᵀX: the factor is computed from it."""


def need_of(settings: LayerRecipe) -> Need:
    """Return the statistics that are needed of a layer's inputs to prune it."""
    # Outlier rows are chosen by squared output norms, the diagonal of W XᵀX Wᵀ.
    if settings.outlier_rows > 0 or settings.repair.needs_gram:
        return Need.GRAM
    return _OF_METHOD.get(registry.method(settings.method).needs, Need.GRAM)


def need_of_all(settings: Iterable[LayerRecipe], measure_error: bool | None) -> Need:
    """Return the statistics to accumulate over all tokens for layers that are observed together."""
    return Need.GRAM if measure_error else max(map(need_of, settings), default=Need.NOTHING)


@dataclass(slots=True)
class Pairs:
    """Products of the dense model and the model pruned so far, for the layers that read one input.

    Attributes:
        cross: C = X*ᵀX̂ of the input in both models, (b, b).
        residuals: name of each layer that writes into the residual stream → R = (r* − r̂)ᵀX̂, (c, b), with r the stream to which
            the layer's output is added.
    """

    cross: CrossGram
    residuals: dict[str, CrossGram] = field(default_factory=dict)

    @classmethod
    def empty(cls, layers: Sequence[LinearLayer], writers: Collection[str], device: torch.device) -> Pairs:
        """Return the sums over no tokens, for ``layers`` that read one input.

        ``writers`` are names of layers that write into the residual stream; they may include other layers.
        """
        columns = layers[0].shape[1]
        residuals = {
            layer.name: CrossGram.empty(layer.shape[0], columns, device) for layer in layers if layer.name in writers
        }
        return cls(CrossGram.empty(columns, columns, device), residuals)


@dataclass(slots=True)
class InputGroup:
    """The layers that read one input, and the statistics of this input.

    Attributes:
        layers: the layers, in the order in which the block calls them.
        whole: statistics over all tokens.
        sample: statistics over the tokens of a sample of sequences.
        tokens: number of rows of X so far.
        pairs: products with the dense model's inputs; None if no layer needs them.
        current: weak reference to the input tensor added last; a layer that receives this tensor next joins the group.
    """

    layers: list[LinearLayer]
    whole: tuple[Accumulator, ...] = ()
    sample: tuple[Accumulator, ...] = ()
    tokens: int = 0
    pairs: Pairs | None = None
    current: weakref.ref[Tensor] | None = field(default=None, repr=False)

    @property
    def accumulators(self) -> tuple[Accumulator, ...]:
        """All statistics: those over all tokens, then those over the sample."""
        return *self.whole, *self.sample

    @property
    def sums(self) -> tuple[Sum, ...]:
        """All statistics, those of :attr:`pairs` last."""
        pairs = () if self.pairs is None else (self.pairs.cross, *self.pairs.residuals.values())
        return *self.accumulators, *pairs

    @property
    def gram(self) -> Gram | None:
        """XᵀX over all tokens or over the sample; None if it is not accumulated."""
        return next((one for one in self.accumulators if isinstance(one, Gram)), None)

    @property
    def norms(self) -> SquaredNorms | None:
        """The squared norms over all tokens; None if no accumulator is for them alone."""
        return next((one for one in self.accumulators if isinstance(one, SquaredNorms)), None)

    @property
    def hessian(self) -> Tensor:
        """XᵀX, (b, b) float32; only if it is accumulated."""
        assert self.gram is not None
        return self.gram.sums

    def reads(self, inputs: Tensor) -> bool:
        """Return whether ``inputs`` is the tensor object that was added last."""
        return self.current is not None and self.current() is inputs

    def add(self, inputs: Tensor, *, sampling: bool = True) -> None:
        """Add the tokens of ``inputs`` (..., b); if ``sampling``, also to the statistics of the sample."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        for one in self.accumulators if sampling else self.whole:
            one.add(rows)
        self.tokens += rows.shape[0]


def empty_group(
    layers: list[LinearLayer], device: torch.device, need: Need = Need.GRAM, *, sample: bool = True
) -> InputGroup:
    """Return a group of layers that read one input, with statistics of no tokens.

    ``need`` is the least to accumulate over all tokens. With ``sample``, XᵀX is also accumulated over a sample, unless it is
    accumulated over all tokens.
    """
    columns = layers[0].shape[1]
    dtype = layers[0].module.get_parameter("weight").dtype
    if need is Need.GRAM or (need is Need.NORMS and not SquaredNorms.suits(columns, dtype, device)):
        return InputGroup(layers, (Gram.empty(columns, device),))
    whole = (SquaredNorms.empty(columns, device),) if need is Need.NORMS else ()
    return InputGroup(layers, whole, (Gram.empty(columns, device),) if sample else ())


def plan_passes(layers: Sequence[LinearLayer], budget: int, *, matrices: int = 1) -> list[list[LinearLayer]]:
    """Split the layers of a block into passes, each with statistics of at most ``budget`` bytes.

    The layers of one module stay in one pass, so that layers with the same input do. A single module may exceed the budget.
    Layers of one module and shape, such as an expert's gate and up, are assumed to share their input, which needs ``matrices``
    (b, b) float32 matrices: 1 for the Hessian alone.
    """
    modules: dict[str, list[LinearLayer]] = {}
    for layer in layers:
        modules.setdefault(layer.name.rpartition(".")[0], []).append(layer)
    passes: list[list[LinearLayer]] = [[]]
    filled = 0
    for members in modules.values():
        needed = sum(4 * matrices * columns**2 for _, columns in {layer.shape for layer in members})
        if passes[-1] and filled + needed > budget:
            passes.append([])
            filled = 0
        passes[-1] += members
        filled += needed
    return passes


class Gathered(list[InputGroup]):
    """The groups of layers, one for each distinct input, in calling order. A layer that is never called is in no group.

    Attributes:
        of: layer name → its group; empty once the statistics are gathered.
        paused: whether inputs are ignored. The caller sets it while it runs the block for another purpose.
        sampling: whether tokens are still added to the statistics of the sample. The caller that runs the block clears it
            between two batches.
    """

    sampling: bool = True
    paused: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, InputGroup] = {}


@contextmanager
def gather(layers: Sequence[LinearLayer], need: Need = Need.GRAM, *, sample: bool = True) -> Iterator[Gathered]:
    """While open, accumulate statistics of the inputs of ``layers``; see :func:`empty_group` for the other arguments."""
    groups = Gathered()
    group_of = groups.of

    def hook(layer: LinearLayer) -> Any:
        def see(_: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            if groups.paused:
                return
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
            # The first layer of a group adds the input; the others only check that it is still the same tensor.
            if group.layers[0] is layer:
                group.current = weakref.ref(inputs)
                group.add(inputs, sampling=groups.sampling)
            elif not group.reads(inputs):
                raise AssertionError(f"{layer.name} shared its input with {group.layers[0].name}, and no longer does")

        return see

    try:
        with ExitStack() as hooks:
            for layer in layers:
                hooks.enter_context(layer.module.register_forward_pre_hook(hook(layer)))
            yield groups
    finally:
        groups.of.clear()  # so that a group's statistics are freed once its layers are solved
        for group in groups:
            group.current = None


def check_finite(groups: Sequence[InputGroup]) -> None:
    """Raise NumericsError for statistics that hold NaN or infinity; it names the first layer that reads the first such input.

    One synchronisation with the device checks all of them.
    """
    known = [(group, one) for group in groups for one in group.sums]
    if not known:
        return
    finite = torch.stack([one.finite() for _, one in known]).tolist()
    for (group, _), good in zip(known, finite, strict=True):
        if not good:
            raise NumericsError(
                f"the inputs of {group.layers[0].name} hold NaN or infinity; the checkpoint is damaged or the "
                "activations overflow: try --dtype float32 or bfloat16"
            )


def statistics_budget(device: torch.device) -> int:
    """Return how many bytes of Hessians may be held at once on a device."""
    return _STATISTICS_BYTES.get(device.type, _STATISTICS_BYTES["cpu"])
