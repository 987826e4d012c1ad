"""The plan of a run after a choice: with the chosen split of neurons and heads, or without the chosen blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from thanos.events import Event, Phase, Watcher
from thanos.model.layers import find_blocks
from thanos.run.cautions import cautions_of
from thanos.run.cut_words import share_words
from thanos.run.cutting import Cutting
from thanos.run.report import DenseRecord
from thanos.run.setup import Prepared


def forecast(plan: Prepared) -> Prepared:
    """Return the plan for a forecast, before blocks are chosen: with the largest number of layers that may be fitted.

    They are those of the last blocks, so that the dense stream has its greatest length.
    """
    if plan.cutting is None or not plan.cutting.drops:
        return plan
    last = len(find_blocks(plan.opened.meta_model)[1]) - 1
    before = range(last - plan.cutting.drops, last)
    layers = {
        layer: settings
        for layer, settings in plan.layers.items()
        if layer.block in before and settings.repair.needs_dense_stream
    }
    return replace(plan, layers=layers)


def with_choice(plan: Prepared, cutting: Cutting, record: Mapping[str, Any], phase: Phase, emit: Watcher) -> Prepared:
    """Return the plan with the choice that the record of a pass states. Layers without further work are left out.

    Args:
        plan: the plan before the pass.
        cutting: its cutting.
        record: result of :func:`~thanos.run.block_choice.chosen_blocks` or :func:`~thanos.run.split.chosen_split`.
        phase: phase of the note about the choice.
        emit: called with the note.
    """
    if "dropped" in record:
        found = replace(cutting, dropped=tuple(record["dropped"]))
        numbers = ", ".join(str(index + 1) for index in found.dropped)
        one = len(found.dropped) == 1
        which = f"block {numbers} is removed: it changes" if one else f"blocks {numbers} are removed: they change"
        message = f"{which} the outputs least ({share_words(found.counted())})"
        before = {index - 1 for index in found.dropped} - set(found.dropped)
        layers = {
            layer: settings
            for layer, settings in plan.layers.items()
            if layer.block in before and settings.repair.needs_dense_stream
        }
        reason = "loses nothing itself"
    else:
        removed = record["splits"][0]["removed"]
        found = replace(cutting, candidates=(removed,))
        share = ", ".join(f"{number} of {cutting.counts[kind]} {kind}" for kind, number in removed.items())
        message = (
            f"every block loses {share}: the split with the least predicted error ({share_words(found.counted())})"
        )
        layers = {layer: settings for layer, settings in found.settings(plan.layers).items() if settings.sparsity}
        reason = "the split removes none of its units"
    emit(Event(kind="note", phase=phase, message=message))
    for caution in cautions_of(plan.opened, found):
        plan.opened.notes.append(caution)
        emit(Event(kind="note", phase=phase, message=caution))
    left = [
        DenseRecord(name=layer.weight_name, parameters=math.prod(layer.shape), reason=reason)
        for layer in plan.layers
        if layer not in layers
    ]
    return replace(plan, layers=layers, dense=[*plan.dense, *left], cutting=found)
