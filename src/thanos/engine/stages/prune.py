"""Pruning a block's layers: gather the statistics of their inputs, then solve them one by one.

The name of a method never occurs here; what is done to a layer is its :class:`~thanos.recipe.LayerRecipe`.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thanos.calibration.statistics import (
    InputGroup,
    Need,
    check_finite,
    empty_group,
    gather,
    need_of_all,
    plan_passes,
    statistics_budget,
)
from thanos.engine.records import LayerRecord, layer_record
from thanos.engine.stages.base import BlockContext
from thanos.events import Event
from thanos.model.layers import LinearLayer
from thanos.recipe import LayerRecipe
from thanos.solvers.hessian import InputStatistics
from thanos.solvers.prune_layer import prune_layer

ERROR_SEQUENCES = 8
"""Sequences whose tokens measure a layer's error where its method does not need XᵀX of all: a batch or a few. The error is a
mean over tokens, of which these are thousands, and nothing is fitted to them."""


@dataclass(frozen=True, slots=True)
class PruneStage:
    """Prunes the layers of a block.

    Args:
        measure_error: see :class:`~thanos.recipe.Recipe`.
        name: in the records.
    """

    measure_error: bool | None = None
    name: str = "prune"

    def __call__(self, context: BlockContext) -> Iterator[Event]:
        """See :class:`~thanos.engine.stages.base.BlockStage`."""
        parts = _parts(context)
        # Every part must see the block as it was, so what the first ones prune is put in place after the last. A layer after
        # the blocks is a part of its own, and gets the inputs that those before it give now.
        held: dict[str, Tensor] | None = {} if len(parts) > 1 and context.index is not None else None
        for part in parts:
            yield context.event("phase", "statistics")
            with context.meter.phase("statistics"):
                groups = yield from self._gather(context, part)
            yield from self._solve(context, part, groups, held)
        for name, weight in (held or {}).items():
            context.place(name, weight)

    def _gather(self, context: BlockContext, layers: list[LinearLayer]) -> Generator[Event, None, list[InputGroup]]:
        """Gather the statistics of layers; from the start again, in smaller batches, where memory runs out."""
        need, sample = self._need(context, layers), -(-ERROR_SEQUENCES // context.world.size)
        if need is Need.NOTHING and not self._samples:
            return []
        most = sample if need is Need.NOTHING else None
        while True:
            try:
                if context.index is not None:
                    context.runner.settle_batch(context.index)
                with gather(layers, need, sample=self._samples) as groups:
                    for done in context.observe(layers, most):
                        groups.sampling = done < sample
                        yield context.progress("statistics", done, most)
                return groups
            except torch.OutOfMemoryError as error:
                if context.index is None:  # one sequence at a time already
                    raise
                yield context.note(context.runner.halve(error), "statistics")

    def _solve(
        self,
        context: BlockContext,
        layers: list[LinearLayer],
        groups: list[InputGroup],
        held: dict[str, Tensor] | None,
    ) -> Iterator[Event]:
        """Prune layers; ``groups`` is emptied on the way, so that each Hessian goes when its layers are done."""
        need = self._need(context, layers)

        def empty(members: list[LinearLayer]) -> InputGroup:
            return empty_group(members, context.device, need, sample=self._samples)

        if context.world.size > 1:
            with context.meter.phase("reduce"):
                groups[:] = context.world.merge(groups, layers, empty)
        seen = {layer.name for group in groups for layer in group.layers}
        groups += [empty([layer]) for layer in layers if layer.name not in seen]
        rank = {layer.name: number for number, layer in enumerate(layers)}
        groups.sort(key=lambda group: min(rank[layer.name] for layer in group.layers))
        done = 0
        yield context.event("phase", "solve", total=len(layers))
        with context.meter.phase("solve"):
            while groups:
                group = groups.pop(0)
                check_finite([group])  # not all at once: a bad weight is named before the bad inputs that it makes
                inputs = _statistics(group)
                for layer in group.layers:
                    record = yield from self._prune_or_spill(context, layer, inputs, group, held)
                    context.add_record(record)
                    done += 1
                    error = record.error_after_compensation
                    yield context.event("layer", "solve", done=done, total=len(layers), layer=layer.name, error=error)

    @property
    def _samples(self) -> bool:
        return self.measure_error is not False

    def _need(self, context: BlockContext, layers: list[LinearLayer]) -> Need:
        """Return what is gathered over all tokens for layers that are observed together."""
        return need_of_all([context.layers[layer] for layer in layers], self.measure_error)

    def _prune_or_spill(
        self,
        context: BlockContext,
        layer: LinearLayer,
        inputs: InputStatistics | None,
        group: InputGroup,
        held: dict[str, Tensor] | None,
    ) -> Generator[Event, None, LayerRecord]:
        """Prune a layer; where memory runs out, again once the hidden states have left the device."""
        try:
            return _prune_layer(context, layer, inputs, group, held)
        except torch.OutOfMemoryError:
            # With several ranks a local retry would desynchronise the collectives.
            if context.world.size > 1 or context.runner.place != "device":
                raise
        # Not in the handler: while it runs, the error keeps the tensors of what failed.
        line = context.runner.spill()
        assert line is not None
        yield context.note(line, "solve")
        return _prune_layer(context, layer, inputs, group, held)


def observed_fractions(
    settings: Sequence[LayerRecipe], measure_error: bool | None, samples: int
) -> tuple[float, float]:
    """Return which fraction of the sequences is run to prune layers that are observed together, and gathered XᵀX of."""
    need = need_of_all(settings, measure_error)
    sampled = 0.0 if measure_error is False else min(1.0, ERROR_SEQUENCES / samples)
    return 1.0 if need > Need.NOTHING else sampled, 1.0 if need is Need.GRAM else sampled


def _parts(context: BlockContext) -> list[list[LinearLayer]]:
    """Return the layers by the passes in which their statistics are gathered."""
    layers = list(context.layers)
    if context.index is None:
        return [[layer] for layer in layers]
    return plan_passes(layers, statistics_budget(context.device)) if layers else []


def _statistics(group: InputGroup) -> InputStatistics | None:
    """Return what is known of a group's inputs, as the solvers take it; None if nothing was gathered. XᵀX is given away."""
    gram, norms, name = group.gram, group.norms, group.layers[0].name
    if gram is None and norms is None:
        return None
    return InputStatistics(
        None if gram is None else gram.sums,
        squared_norms=None if norms is None else norms.squared_norms(),
        name=name,
        hand_over=True,
    )


def _prune_layer(
    context: BlockContext,
    layer: LinearLayer,
    inputs: InputStatistics | None,
    group: InputGroup,
    held: dict[str, Tensor] | None,
) -> LayerRecord:
    """Prune one layer and write it; put it in place too, or into ``held`` if that has to wait."""
    settings, name = context.layers[layer], layer.weight_name
    began = time.perf_counter()
    stored = context.weights.stored(name)
    pruned = prune_layer(layer.oriented(stored), inputs, settings, name=layer.name, row_shards=context.world)
    result = layer.oriented(pruned.weight).contiguous()
    seconds = time.perf_counter() - began  # the device is done: the record's numbers are here
    measured = 0 if group.gram is None else group.gram.tokens
    record = layer_record(layer, pruned, inputs, settings, stored.dtype, group.tokens, measured, seconds)
    if held is None:
        context.put(name, result)
    else:
        held[name] = result = result.cpu()
        context.write(name, result)
    return record
