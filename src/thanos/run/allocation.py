"""The pass before the loop that measures the layers' errors, and chooses their sparsities or the split of units by them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thanos import registry
from thanos.calibration.windows import Calibration
from thanos.engine.distributed import World
from thanos.engine.loop import Engine
from thanos.engine.rank_zero import SharedWriter
from thanos.engine.records import NoJournal
from thanos.engine.stages.base import BlockStage
from thanos.engine.stages.effects import EffectStage
from thanos.engine.stages.measure import MeasureStage
from thanos.events import Event, Watcher
from thanos.model.layers import LinearLayer
from thanos.patterns.budget import Budget
from thanos.recipe import LayerRecipe, Recipe
from thanos.recipe.allocation import is_allocated
from thanos.run import block_choice
from thanos.run.block_choice import chosen_blocks
from thanos.run.cutting import Cutting
from thanos.run.engine_setup import build_engine
from thanos.run.settling import with_choice
from thanos.run.setup import Prepared
from thanos.run.split import chosen_split
from thanos.solvers.allocation import Curve, allocate
from thanos.system.documents import json_text
from thanos.system.files import write_atomically
from thanos.system.meter import PhaseMeter, PhaseRecord

SEQUENCES = 16
"""Number of calibration sequences of the pass: error curves need fewer tokens than updates of weights."""

PHASE = "allocate"


def choose_sparsities(
    plan: Prepared,
    recipe: Recipe,
    calibration: Calibration,
    *,
    device: torch.device,
    world: World,
    folder: Path,
    activations: str,
    meter: PhaseMeter,
    emit: Watcher,
    store: Path | None,
) -> tuple[Prepared, dict[str, Any] | None]:
    """Return the plan with the sparsities that the recipe's allocation chooses, and their record; or the plan and None.

    All processes of the run call this function. The pass reads the first of the calibration windows, and is added to ``meter``
    as one phase. ``folder`` is for hidden states that are kept on the disk. ``store`` is the file that keeps the choice, so
    that a resumed run has the choice of the interrupted one; None on ranks other than 0.
    """
    layers, cutting = measured_layers(plan, recipe), plan.cutting
    drops = cutting is not None and cutting.drops > 0
    if not layers and not drops:
        return plan, None
    record: dict[str, Any] | None = world.from_first(lambda: _read(store))
    if record is None:
        own, ids = PhaseMeter(device), calibration.ids[: max(sequences_of(cutting), world.size)]

        def run(stage: BlockStage, dropped: Sequence[int] = ()) -> None:
            engine = build_engine(
                replace(
                    plan, layers=layers, cutting=None if cutting is None else replace(cutting, dropped=tuple(dropped))
                ),
                recipe,
                ids,
                device,
                folder,
                activations=activations,
                writer=SharedWriter(None, world),
                journal=NoJournal(),
                meter=own,
                world=world,
                stages=(stage,),
            )
            _measure(engine, emit)

        if cutting is not None and drops:
            found = _blocks(plan.data_flow.reached, cutting.drops, run)
        else:
            stage = MeasureStage()
            run(stage)
            found = _found(layers, cutting, stage)
        record = world.from_first(lambda: {"sequences": len(ids)} | found)
        meter.add({PHASE: _total(own)})
        if store is not None:
            write_atomically(store, json_text(record).encode(), durable=True)
    if cutting is not None:
        return with_choice(plan, cutting, record, PHASE, emit), record
    emit(Event(kind="note", phase=PHASE, message=summary(record)))
    chosen = {name: layer["sparsity"] for name, layer in record["layers"].items()}
    changed = {
        layer: replace(settings, sparsity=chosen[layer.name]) if layer.name in chosen else settings
        for layer, settings in plan.layers.items()
    }
    return replace(plan, layers=changed), record


def sequences_of(cutting: Cutting | None) -> int:
    """Return the largest number of calibration sequences on which the pass measures."""
    return SEQUENCES if cutting is None or not cutting.drops else block_choice.SEQUENCES


def measured_layers(plan: Prepared, recipe: Recipe) -> dict[LinearLayer, LayerRecipe]:
    """Return the layers that the pass measures, each with only the settings of the method."""
    every = plan.cutting is not None and plan.cutting.is_open
    return {
        layer: _without_repair(settings)
        for layer, settings in plan.layers.items()
        if every or is_allocated(recipe, layer.name)
    }


def summary(record: Mapping[str, Any]) -> str:
    """Return the choice in one line."""
    sparsities = [layer["sparsity"] for layer in record["layers"].values()]
    if not sparsities:
        return "no layer's error could be measured: all layers keep the recipe's sparsity"
    return (
        f"{len(sparsities)} layers have sparsities from {100 * min(sparsities):.1f} to {100 * max(sparsities):.1f} %, chosen "
        "by their errors; the total is that of the recipe's sparsity"
    )


def _without_repair(settings: LayerRecipe) -> LayerRecipe:
    """Return only the settings of the method: the pass needs no hidden states of a second model."""
    off = dict.fromkeys(("dense_target", "sequential", "refit", "tune"))
    scope = settings.resolved_scope if settings.parsed_pattern.any_entries else None
    return replace(settings, effort=registry.DEFAULT_EFFORT, scope=scope, **off)


def _measure(engine: Engine, emit: Watcher) -> None:
    """Run the pass; emit its notes, and the number of finished blocks."""
    total = len(engine.inputs.blocks)
    emit(Event(kind="phase", phase=PHASE, blocks=total))
    for event in engine.run():
        if event.kind == "note":
            emit(replace(event, phase=PHASE, block=None))
        elif event.kind == "block" and event.block is not None:
            emit(Event(kind="progress", phase=PHASE, blocks=total, done=event.block + 1, total=total))


def _blocks(blocks: Sequence[int], number: int, run: Callable[[BlockStage, Sequence[int]], None]) -> dict[str, Any]:
    """Return the record of the blocks to remove; ``run`` runs a stage over the model without some blocks."""
    wanted: list[Tensor] | None = None

    def measure(gone: Sequence[int], candidates: Sequence[int]) -> dict[int, float]:
        nonlocal wanted
        with closing(EffectStage([block for block in blocks if block not in gone], candidates, wanted)) as stage:
            run(stage, gone)
        wanted = stage.wanted
        return stage.effects

    return chosen_blocks(blocks, number, measure)


def _found(layers: Mapping[LinearLayer, LayerRecipe], cutting: Cutting | None, stage: MeasureStage) -> dict[str, Any]:
    """Return the record of the pass: its measurements and the choice."""
    if cutting is not None:
        return chosen_split(cutting.candidates, cutting.parameters, cutting.target, cutting.kinds(layers), stage.curves)
    return _choice(layers, stage.curves)


def _choice(layers: Mapping[LinearLayer, LayerRecipe], curves: Mapping[str, Curve]) -> dict[str, Any]:
    """Return the record: for each measured layer its sparsity, its gain and its errors by sparsity.

    The measured layers have together as many zeros as with the recipe's sparsity.
    """
    known = {layer: settings for layer, settings in layers.items() if layer.name in curves}
    total = sum(Budget.plan(*layer.shape, settings).weights for layer, settings in known.items())
    ordered = [curves[layer.name] for layer in known]
    chosen = allocate(ordered, total)
    return {
        "zeros": total,
        "layers": {
            layer.name: {
                "sparsity": zeros / curve.size,
                "gain": curve.gain,
                "errors": [list(point) for point in zip(curve.sparsities, curve.errors, strict=True)],
            }
            for layer, curve, zeros in zip(known, ordered, chosen, strict=True)
        },
    }


def _read(store: Path | None) -> dict[str, Any] | None:
    """Return the record of an interrupted run; None without one, or if the file is damaged: the choice is made again."""
    try:
        return None if store is None else json.loads(store.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def _total(meter: PhaseMeter) -> PhaseRecord:
    """Return the phases of the pass as one."""
    records = list(meter.records().values())
    return PhaseRecord(
        seconds=sum(record.seconds for record in records),
        host_peak_bytes=max((record.host_peak_bytes for record in records), default=0),
        device_peak_bytes=max((record.device_peak_bytes or 0 for record in records), default=0) or None,
    )
