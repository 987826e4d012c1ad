"""A stage that measures each layer's error by sparsity on the dense model, before an allocation by error.

Two quantities are measured on a small sample of the calibration sequences:

- A layer's error curve. The layer's own method prunes a sample of its rows at a few sparsities. So the curve includes
  compensation, scope and damping, as the run will, for a few percent of the time. A sum of costs of single weights would be
  too small, since weights that are removed together cannot compensate for each other.
- The layer's gain: the part of the layer's error that reaches the block's output. There the errors of all layers are
  comparable.
"""

from __future__ import annotations

import math
import re
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from thanos.calibration.statistics import (
    InputGroup,
    Need,
    check_finite,
    empty_group,
    gather,
    plan_passes,
    statistics_budget,
)
from thanos.engine.stages.base import BlockContext
from thanos.events import Event
from thanos.model.layers import LinearLayer
from thanos.patterns.units import Units
from thanos.recipe import LayerRecipe
from thanos.solvers.allocation import Curve
from thanos.solvers.hessian import InputStatistics
from thanos.solvers.layer_error import squared_output_norms
from thanos.solvers.masking import only
from thanos.solvers.prune_layer import prune_layer
from thanos.solvers.row_selection import even_rows_mask

ROWS = 64
"""Number of rows of a layer on which its curve is measured. A sample suffices: the error is a ratio of sums over rows."""

SPREAD = 0.15
"""Largest difference between a layer's sparsity and the recipe's. Errors add up only as long as they are small."""

STEPS = 3
"""Number of sparsities that are measured below the recipe's, and above it."""

UNIT_STEPS = 5
"""Number of points of a curve if a layer loses whole units."""

_GAIN_SEQUENCES = 4
"""Number of sequences, of all processes, on which the gains are measured. A few suffice, since a gain is a mean over tokens."""

_FIXED = 1 << 32
"""Scale of the fixed-point sums over processes: sums of integers do not depend on their order."""

_HIGHEST = 0.99
"""Largest fraction of the entries of prunable rows that a curve removes."""


@dataclass(slots=True)
class _Probe:
    """Data of a layer for the measurement of its gain: norms of its inputs, its tokens, and the error of the probe."""

    norms: Tensor
    tokens: int
    error: float


class MeasureStage:
    """Measures the curves of the layers of each block. It changes no weight and writes nothing.

    Attributes:
        name: name of the stage.
        curves: layer name → curve, of every layer whose error could be measured; filled block by block.
    """

    name = "measure"

    def __init__(self) -> None:
        self.curves: dict[str, Curve] = {}

    def __call__(self, context: BlockContext) -> Iterator[Event]:
        """See :class:`~thanos.engine.stages.base.BlockStage`."""
        layers, probes = list(context.layers), dict[LinearLayer, _Probe]()
        if not layers:
            return
        whole = context.index is not None
        for part in plan_passes(layers, statistics_budget(context.device)) if whole else [[layer] for layer in layers]:
            with context.meter.phase("statistics"):
                groups = yield from _gather(context, part)
            with context.meter.phase("solve"):
                while groups:
                    probes |= self._measure(context, groups.pop(0))
        if whole:
            with context.meter.phase("propagate"):
                for name, gain in _gains(context, probes).items():
                    self.curves[name] = replace(self.curves[name], gain=gain)

    def _measure(self, context: BlockContext, group: InputGroup) -> dict[LinearLayer, _Probe]:
        """Measure the curves of the layers that share an input; return their probes."""
        check_finite([group])
        inputs, probes = InputStatistics(group.hessian, name=group.layers[0].name, hand_over=True), {}
        for layer in group.layers:
            settings = context.layers[layer]
            weight = layer.oriented(context.dense(layer.weight_name))
            curve = None if inputs.empty else error_curve(weight, inputs, settings, layer.name)
            if curve is None:
                continue
            self.curves[layer.name] = curve
            dense = weight.to(inputs.dtype)
            removed = _probe(dense, inputs.norms, settings.resolved_sparsity)
            norm = float(squared_output_norms(dense, inputs).sum())
            lost = float(squared_output_norms(only(dense, removed), inputs).sum())
            probes[layer] = _Probe(inputs.norms, group.tokens, lost / norm if norm > 0 else 0.0)
        return probes


def error_curve(weight: Tensor, inputs: InputStatistics, settings: LayerRecipe, name: str) -> Curve | None:
    """Return the relative squared output error of a layer by sparsity; None if it cannot be measured.

    The layer's method prunes the same sample of rows at each sparsity. The sample is random, since equally spaced rows may
    be the same row of every attention head, and depends only on the number of rows.

    Args:
        weight: the weight, (c, b).
        inputs: statistics of the layer's inputs.
        settings: settings of the layer; the sparsities lie around theirs.
        name: name of the layer, for messages.
    """
    pattern = settings.parsed_pattern
    if isinstance(pattern, Units):
        return _unit_curve(weight, inputs, settings, pattern, name)
    rows = len(weight)
    draw = torch.randperm(rows, generator=torch.Generator().manual_seed(0))[:ROWS].sort().values
    sample = weight[draw.to(weight.device)]
    room = min(1 - math.ceil(settings.outlier_rows * count) / count for count in (rows, len(sample)))
    sparsities = _around(settings.resolved_sparsity, _HIGHEST * room)
    errors = []
    for sparsity in sparsities:
        pruned = prune_layer(sample, inputs, replace(settings, sparsity=sparsity), name=name)
        if pruned.error_after_compensation is None:
            return None
        errors.append(pruned.error_after_compensation)
    return Curve(weight.numel(), sparsities, tuple(errors))


def _unit_curve(
    weight: Tensor, inputs: InputStatistics, settings: LayerRecipe, pattern: Units, name: str
) -> Curve | None:
    """Return the error by fraction of removed units, up to the settings' fraction.

    All rows are used, since they choose the units together. ``size`` of the curve is the number of units.
    """
    _, count, _ = pattern.layout(weight.shape[1])
    most = round(settings.resolved_sparsity * count)
    numbers = sorted({max(1, most * step // UNIT_STEPS) for step in range(1, UNIT_STEPS + 1)})
    errors = []
    for number in numbers:
        pruned = prune_layer(weight, inputs, replace(settings, sparsity=number / count), name=name)
        if pruned.error_after_compensation is None:
            return None
        errors.append(pruned.error_after_compensation)
    return Curve(count, tuple(number / count for number in numbers), tuple(errors))


def _around(sparsity: float, most: float) -> tuple[float, ...]:
    """Return the sparsities at which a curve is measured, ascending; ``sparsity`` is one of them."""
    low, high = max(0.0, sparsity - SPREAD), max(sparsity, min(sparsity + SPREAD, most))
    below = [low + (sparsity - low) * step / STEPS for step in range(STEPS)]
    above = [sparsity + (high - sparsity) * step / STEPS for step in range(1, STEPS + 1)]
    return tuple(sorted({*below, sparsity, *above}))


def _gather(context: BlockContext, layers: list[LinearLayer]) -> Generator[Event, None, list[InputGroup]]:
    """Gather XᵀX of the layers' inputs over the sequences of all processes. If memory runs out, halve the batches."""
    while True:
        try:
            if context.index is not None:
                context.runner.settle_batch(context.index)
            with gather(layers, Need.GRAM) as groups:
                for done in context.observe(layers):
                    yield context.progress("statistics", done)
            break
        except torch.OutOfMemoryError as error:
            if context.index is None:
                raise
            yield context.note(context.runner.halve(error), "statistics")
    if context.world.size == 1:
        return list(groups)
    return context.world.merge(groups, layers, lambda members: empty_group(members, context.device, Need.GRAM))


def _probe(weight: Tensor, norms: Tensor, sparsity: float) -> Tensor:
    """Return a mask of entries whose removal causes an error like that of pruning: the smallest |W_ij|·‖X_j‖₂ of each row."""
    return even_rows_mask((weight * norms).abs_(), int(sparsity * weight.numel()))


def _gains(context: BlockContext, probes: dict[LinearLayer, _Probe]) -> dict[str, float]:
    """Return for each layer how much of its relative squared error reaches the block's output.

    The gain is the mean over tokens of ‖Δ block output‖² / ‖block output‖², divided by the layer's own relative error, for a
    layer without its smallest entries. All tokens have equal weight, since the next block normalises each token; in a plain
    sum, the few tokens with the largest norms would outweigh all others. Layers whose names differ only in a number are the
    experts of a block. They are changed together, and their effect is divided among them in proportion to their tokens.
    """
    assert context.index is not None
    kinds: dict[str, list[LinearLayer]] = {}
    for layer in probes:
        kinds.setdefault(re.sub(r"\d+", "#", layer.name), []).append(layer)
    count = _own_sequences(context)
    outputs = [context.forward(hidden, first) for first, hidden in _first_sequences(context, count)]
    gains: dict[str, float] = {}
    for layers in kinds.values():
        held = {layer.weight_name: context.weights.parameter(layer.weight_name) for layer in layers}
        for layer in layers:
            weight = layer.oriented(held[layer.weight_name].detach())
            removed = _probe(weight.to(probes[layer].norms.dtype), probes[layer].norms, _sparsity(context, layer))
            context.assign(layer.weight_name, layer.oriented(weight.masked_fill(removed, 0.0)).contiguous())
        changed = [
            _relative_change(context.forward(hidden, first), before)
            for (first, hidden), before in zip(_first_sequences(context, count), outputs, strict=True)
        ]
        for name, value in held.items():
            context.assign(name, value.detach())
        effect = token_mean(context, changed)
        tokens = sum(probes[layer].tokens for layer in layers)
        shares = {layer: probes[layer].tokens / tokens for layer in layers}
        own = sum(share * probes[layer].error for layer, share in shares.items())
        gains |= {layer.name: share * effect / own if own > 0 else 0.0 for layer, share in shares.items()}
    return gains


def _sparsity(context: BlockContext, layer: LinearLayer) -> float:
    return context.layers[layer].resolved_sparsity


def _own_sequences(context: BlockContext) -> int:
    """Return how many of the first sequences of all processes this process has. All processes must call this."""
    own = context.runner.shape[0]
    before = int(context.world.before(torch.tensor([own], device=context.device)))
    return min(own, max(0, _GAIN_SEQUENCES - before))


def _first_sequences(context: BlockContext, count: int) -> Iterator[tuple[int, Tensor]]:
    for first, hidden in context.batches(1):
        if first >= count:
            return
        yield first, hidden


def _relative_change(after: Tensor, before: Tensor) -> Tensor:
    """Return ‖after − before‖² / ‖before‖² of each token, (tokens,) float64 on the CPU; a token of norm 0 is left out."""
    change = (after - before).double().square().sum(-1).flatten()
    norm = before.double().square().sum(-1).flatten()
    return (change / norm)[norm > 0].cpu()


def token_mean(context: BlockContext, values: Sequence[Tensor]) -> float:
    """Return the mean over the tokens of all processes, the same bits on each."""
    every = torch.cat([torch.zeros(0, dtype=torch.float64), *values])
    sums = torch.tensor([round(float(every.sum()) * _FIXED), every.numel()], dtype=torch.int64)
    total, count = context.world.sum_(sums.to(context.device)).tolist()
    return total / _FIXED / max(1, count)
