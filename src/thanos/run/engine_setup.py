"""The engine of a run: the stages and the inputs that a recipe requires."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thanos.checkpoint.writer import CheckpointWriter
from thanos.engine.block_runner import Passes
from thanos.engine.distributed import SINGLE, World
from thanos.engine.inputs import EngineInputs
from thanos.engine.loop import Engine
from thanos.engine.rank_zero import SharedWriter
from thanos.engine.records import BlockJournal
from thanos.engine.stages.base import BlockStage
from thanos.engine.stages.prune import PruneStage
from thanos.engine.stages.tune import TuneStage
from thanos.engine.weights import ModelWeights
from thanos.model.layers import find_blocks
from thanos.recipe import Recipe
from thanos.recipe.repair import held_out_count
from thanos.run.setup import Prepared
from thanos.system.meter import PhaseMeter


def stages_of(recipe: Recipe) -> tuple[BlockStage, ...]:
    """Return the stages that a recipe runs on each block, in order."""
    prune = PruneStage(measure_error=recipe.measure_error)
    if any(repair.tune for repair in recipe.repairs):
        return prune, TuneStage(rate=recipe.tune_rate, seed=recipe.seed, by_token=recipe.tune_loss == "token")
    return (prune,)


def build_engine(
    prepared: Prepared,
    recipe: Recipe,
    ids: Tensor,
    device: torch.device,
    folder: Path,
    *,
    activations: str,
    writer: CheckpointWriter | SharedWriter,
    journal: BlockJournal,
    meter: PhaseMeter,
    world: World = SINGLE,
    notes: Sequence[str] = (),
    stages: Sequence[BlockStage] | None = None,
) -> Engine:
    """Return the engine of this process, which runs blocks on the process's own range of sequences.

    The trial of ``--plan`` uses it too.

    Args:
        prepared: the opened model, and the layers to prune.
        recipe: determines the stages, and the number of sequences that are held out.
        ids: token ids of the calibration sequences of all processes, (samples, T).
        device: device on which blocks run and layers are solved.
        folder: folder for the file of hidden states, if they are kept on the disk.
        activations: storage tier of the hidden states; see :func:`~thanos.engine.activations.choose_tier`.
        writer: writer of finished tensors.
        journal: journal of finished blocks.
        meter: meter of seconds and peak memory by phase.
        world: the processes that share the work.
        notes: warnings from before the loop.
        stages: stages that take the place of the recipe's. With them no sequences are held out.

    Raises:
        RecipeError: there are too few sequences to hold any out.
    """
    opened, (name, blocks) = prepared.opened, find_blocks(prepared.opened.meta_model)
    share = world.share(len(ids))
    mine = ids[share.start : share.stop]
    inputs = EngineInputs(
        model=opened.meta_model,
        blocks_name=name,
        blocks=blocks,
        layers=prepared.layers,
        weights=ModelWeights(opened.meta_model, opened.checkpoint, opened.key_of, device),
        writer=writer,
        journal=journal,
        runner=Passes(opened.meta_model, blocks, mine, device, folder, tier=activations, data_flow=prepared.data_flow),
        device=device,
        meter=meter,
        world=world,
        dropped=frozenset() if prepared.cutting is None else frozenset(prepared.cutting.dropped),
        **(held_out_here(recipe, len(ids), share) if stages is None else {}),
    )
    return Engine(inputs, stages_of(recipe) if stages is None else stages, notes=notes)


def held_out_here(recipe: Recipe, samples: int, share: range) -> dict[str, Any]:
    """Return the values of ``first``, ``held_out`` and ``held_out_of_all`` in :class:`~thanos.engine.inputs.EngineInputs`.

    ``samples`` is the number of sequences of all processes; ``share`` is the range of this process's sequences among them.
    """
    count = held_out_count(recipe, samples)
    first = min(max(samples - count - share.start, 0), len(share))
    return {"first": share.start, "held_out": range(first, len(share)), "held_out_of_all": count}
