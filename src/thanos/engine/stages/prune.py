"""Pruning a block's layers: gather the statistics of their inputs, then solve the layers one by one.

No method is named here: each layer's :class:`~thanos.recipe.LayerRecipe` selects its method and settings.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from thanos.calibration.statistics import (
    InputGroup,
    Need,
    Pairs,
    check_finite,
    empty_group,
    gather,
    need_of,
    need_of_all,
)
from thanos.engine.dense_choice import Choice
from thanos.engine.paired_pass import PairedPass
from thanos.engine.records import LayerRecord, layer_record
from thanos.engine.stages.base import BlockContext
from thanos.engine.stages.prune_order import Plan, Step, plan_of
from thanos.engine.stages.prune_target import alpha_of, choose_target, is_open, target_of
from thanos.events import Event
from thanos.model.layers import LinearLayer
from thanos.recipe import LayerRecipe
from thanos.recipe.repair import AUTO
from thanos.solvers.hessian import InputStatistics
from thanos.solvers.prune_layer import prune_layer

ERROR_SEQUENCES = 8
"""Number of sequences that measure a layer's error if its method does not need XᵀX of all sequences: one batch or a few. They
suffice because the error is a mean over their thousands of tokens, and nothing is fitted to them."""


@dataclass(frozen=True, slots=True)
class PruneStage:
    """Prunes the layers of a block.

    Args:
        measure_error: see :class:`~thanos.recipe.Recipe`.
        name: name of the stage in the records.
    """

    measure_error: bool | None = None
    name: str = "prune"

    def __call__(self, context: BlockContext) -> Iterator[Event]:
        """See :class:`~thanos.engine.stages.base.BlockStage`."""
        plan = plan_of(context)
        if context.block_errors is not None:
            context.block_errors = replace(context.block_errors, writers=[*plan.streams])
        for step in plan.steps:
            yield from self._prune_step(context, plan, step)

    def _prune_step(self, context: BlockContext, plan: Plan, step: Step) -> Iterator[Event]:
        # All parts of a step must gather statistics with the same weights. So with several parts, the pruned weights are held
        # until the last part is solved. Each layer after the blocks is a step of its own; its inputs come from the layers
        # already pruned before it.
        held: dict[str, Tensor] | None = {} if len(step) > 1 else None
        for part in step:
            yield context.event("phase", "statistics")
            with context.meter.phase("statistics"):
                groups = yield from self._gather(context, plan, part)
            yield from self._solve(context, plan, part, groups, held)
        for name, weight in (held or {}).items():
            context.assign(name, weight)

    def _gather(
        self, context: BlockContext, plan: Plan, layers: list[LinearLayer]
    ) -> Generator[Event, None, list[InputGroup]]:
        """Gather the statistics of layers. If memory runs out, start again with smaller batches."""
        need, sample = self._need(context, layers), -(-ERROR_SEQUENCES // context.world.size)
        if need is Need.NOTHING and not self._samples:
            return []
        most = sample if need is Need.NOTHING else None
        while True:
            try:
                if context.index is not None:
                    context.runner.settle_batch(context.index)
                with gather(layers, need, sample=self._samples) as groups:
                    if plan.pairs(layers):
                        most = plan.fitted(layers)
                        streams, calls = plan.streams, plan.calls
                        passed = PairedPass(context, layers, streams, plan.pairable, groups, calls).run(most)
                    else:
                        passed = context.observe(layers, most)
                    for done in passed:
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
        plan: Plan,
        layers: list[LinearLayer],
        groups: list[InputGroup],
        held: dict[str, Tensor] | None,
    ) -> Iterator[Event]:
        """Prune layers. Groups are removed from ``groups`` one by one, so that each Hessian is freed after its layers."""
        need = self._need(context, layers)

        def empty(members: list[LinearLayer]) -> InputGroup:
            group = empty_group(members, context.device, need, sample=self._samples)
            if plan.pairs(layers) and any(layer.name in plan.pairable for layer in members):
                group.pairs = Pairs.empty(members, plan.streams, context.device)
            return group

        if context.world.size > 1:
            with context.meter.phase("reduce"):
                groups[:] = context.world.merge(groups, layers, empty)
        seen = {layer.name for group in groups for layer in group.layers}
        groups += [empty([layer]) for layer in layers if layer.name not in seen]
        rank = {layer.name: number for number, layer in enumerate(layers)}
        groups.sort(key=lambda group: min(rank[layer.name] for layer in group.layers))
        choice = None
        known: dict[int, InputStatistics | None] = {}
        opened = [layer for group in groups for layer in group.layers if is_open(context, layer, group)]
        if opened:
            yield context.event("phase", "choose")
            with context.meter.phase("choose"):
                check_finite(groups)
                known = {id(group): _statistics(group) for group in groups}
                choice = choose_target(context, groups, known)
                context.add_choice(opened, choice.errors)
            for line in context.block_meter.take_notes() if context.block_meter else ():
                yield context.note(line, "choose")
        done = 0
        yield context.event("phase", "solve", total=len(layers))
        with context.meter.phase("solve"):
            while groups:
                group = groups.pop(0)
                if choice is None:
                    # Group by group: the error then names a non-finite weight, not the later inputs that it made non-finite.
                    check_finite([group])
                inputs = known.pop(id(group)) if id(group) in known else _statistics(group)
                for layer in group.layers:
                    record = yield from self._prune_or_spill(context, layer, inputs, group, choice, held)
                    context.add_record(record)
                    done += 1
                    error = record.error_after_compensation
                    yield context.event("layer", "solve", done=done, total=len(layers), layer=layer.name, error=error)

    @property
    def _samples(self) -> bool:
        return self.measure_error is not False

    def _need(self, context: BlockContext, layers: list[LinearLayer]) -> Need:
        """Return the statistics that are gathered over all tokens for layers that are observed together."""
        return need_of_all([context.layers[layer] for layer in layers], self.measure_error)

    def _prune_or_spill(
        self,
        context: BlockContext,
        layer: LinearLayer,
        inputs: InputStatistics | None,
        group: InputGroup,
        choice: Choice | None,
        held: dict[str, Tensor] | None,
    ) -> Generator[Event, None, LayerRecord]:
        """Prune a layer. If memory runs out, move the hidden states off the device and try once more."""
        try:
            return _prune_layer(context, layer, inputs, group, choice, held)
        except torch.OutOfMemoryError:
            # With several ranks a local retry would desynchronise the collectives.
            if context.world.size > 1 or not context.on_device:
                raise
        # Outside the except block: inside it, the error's traceback still refers to the tensors of the failed solve.
        for line in context.spill():
            yield context.note(line, "solve")
        return _prune_layer(context, layer, inputs, group, choice, held)


def sampled_sequences(settings: Iterable[LayerRecipe], measure_error: bool | None) -> int:
    """Return the number of first sequences that cost more than the later ones: errors are measured on them."""
    known = list(settings)
    layers = measure_error is None and any(need_of(one) < Need.GRAM for one in known)
    repairs = [one.repair for one in known]
    blocks = any(one.needs_dense_stream for one in repairs) and not any(one.holds_out for one in repairs)
    return ERROR_SEQUENCES if layers or blocks else 0


def observed_fractions(
    settings: Sequence[LayerRecipe], measure_error: bool | None, samples: int
) -> tuple[float, float]:
    """Return two fractions of the sequences, for layers that are observed together.

    Args:
        settings: settings of the layers.
        measure_error: see :class:`~thanos.recipe.Recipe`.
        samples: number of sequences.

    Returns:
        The fraction that is run through the block, and the fraction of which XᵀX is gathered.
    """
    need = need_of_all(settings, measure_error)
    sampled = 0.0 if measure_error is False else min(1.0, ERROR_SEQUENCES / samples)
    return 1.0 if need > Need.NOTHING else sampled, 1.0 if need is Need.GRAM else sampled


def _statistics(group: InputGroup) -> InputStatistics | None:
    """Return the statistics of a group's inputs for the solvers; None if nothing was gathered.

    The solvers own XᵀX afterwards and may overwrite it.
    """
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
    choice: Choice | None,
    held: dict[str, Tensor] | None,
) -> LayerRecord:
    """Prune one layer and write it to the output. Set the block's weight too, or store it in ``held`` if there is one."""
    settings, name = context.layers[layer], layer.weight_name
    alpha = alpha_of(context, layer, group, choice)
    began = time.perf_counter()
    stored = context.weights.stored(name)
    pruned = prune_layer(
        layer.oriented(stored),
        inputs,
        settings,
        name=layer.name,
        row_shards=context.world,
        retarget=None if alpha is None else target_of(layer, group, alpha),
    )
    result = layer.oriented(pruned.weight).contiguous()
    # No synchronisation needed: the errors are on the host, so the device is done.
    seconds = time.perf_counter() - began
    measured = 0 if group.gram is None else group.gram.tokens
    record = layer_record(layer, pruned, inputs, settings, stored.dtype, group.tokens, measured, seconds)
    record = replace(record, dense_target=alpha)
    if context.index is None and choice is not None and settings.repair.dense_target == AUTO:
        record = replace(record, choice={f"{candidate:g}": error for candidate, error in choice.errors.items()})
    if record.removed_units is not None:
        context.removes(layer.name, record.removed_units)
    if held is None:
        context.put(name, result)
    else:
        held[name] = result = result.cpu()
        context.write(name, result)
    return record
