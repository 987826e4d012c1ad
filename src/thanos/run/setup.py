"""Preparation and checks before a run: open the model, select its layers, check the calibration text and the disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thanos.calibration.text import check_text_source
from thanos.calibration.windows import Calibration, check_positions
from thanos.checkpoint.writer import CheckpointWriter, check_room
from thanos.engine.block_runner import Passes
from thanos.engine.distributed import SINGLE, World
from thanos.engine.inputs import EngineInputs
from thanos.engine.loop import Engine
from thanos.engine.picture import Picture, draw_picture
from thanos.engine.rank_zero import SharedWriter
from thanos.engine.records import BlockJournal
from thanos.engine.stages.base import BlockStage
from thanos.engine.stages.prune import PruneStage
from thanos.engine.weights import ModelWeights
from thanos.errors import ModelError, RecipeError
from thanos.events import Event, Watcher
from thanos.model.layers import LinearLayer, find_blocks, linear_layers, select_layers
from thanos.model.loading import context_length, end_of_text_id
from thanos.model.opening import OpenedModel, open_model
from thanos.model.source import ModelSource
from thanos.patterns.budget import Budget
from thanos.recipe import LayerRecipe, Recipe, check_globs
from thanos.run.report import DenseRecord
from thanos.run.survey import sampled_sparsity, survey
from thanos.system.device import choose_device
from thanos.system.meter import PhaseMeter

LOG_BYTES_PER_LAYER = 4096
"""Bytes on the disk per pruned layer for the journal, the event log and the report."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """An opened model, and the selection of its layers.

    Attributes:
        opened: the model.
        layers: the layers to prune, each with its settings.
        picture: the data flow between the model's blocks.
        dense: record of each tensor that is not pruned.
        zeros_elsewhere: number of zeros in the tensors that are not pruned.
        sparsity: fraction of zeros in ``layers`` before pruning, estimated from a sample.
    """

    opened: OpenedModel
    layers: dict[LinearLayer, LayerRecipe]
    picture: Picture
    dense: list[DenseRecord]
    zeros_elsewhere: int
    sparsity: float


def checked_recipe(recipe: Any) -> Recipe:
    """Return ``recipe``, or the default recipe for None.

    Raises:
        RecipeError: the argument is no recipe, or has a glob that can match no layer.
    """
    if recipe is None:
        return Recipe()
    if not isinstance(recipe, Recipe):
        raise RecipeError(
            f"recipe must be a thanos.Recipe, such as Recipe(sparsity=0.5) or Recipe.from_toml(FILE); got "
            f"{type(recipe).__name__} {str(recipe)[:60]!r}"
        )
    check_globs(recipe)
    return recipe


def check_text_settings(source: ModelSource, recipe: Recipe) -> None:
    """Check that a model can process the calibration text, before its weights are read.

    Raises:
        ModelError: the model has no readable tokenizer.
        DataError: the model has fewer positions than a sequence has tokens, or it names no end-of-text token.
    """
    config = source.config()
    check_positions(recipe.sequence_length, context_length(config))
    end_of_text_id(source.tokenizer(), config)


def prepare(
    source: ModelSource, recipe: Recipe, watch: Watcher, *, look: bool = True, folder: Path | None = None
) -> Prepared:
    """Open a model, and select the layers to prune and their settings.

    Args:
        source: the model.
        recipe: the recipe.
        watch: function that is called with notes and progress events.
        look: also read and check every tensor that is not pruned; see :func:`~thanos.run.survey.survey`.
        folder: output folder; the free space of its disk is checked before tensors are read. None to skip this check.

    Raises:
        ModelError, RecipeError: the recipe does not fit the model, or its blocks cannot be run one by one.
        NumericsError: ``look`` is set, and a parameter that is not pruned holds NaN or infinity.
        ResourceError: the disk has too little room.
    """
    opened = open_model(source, recipe.dtype)
    for note in opened.notes:
        watch(Event(kind="note", phase="load", message=note))
    chosen, left_dense = select_layers(linear_layers(opened.meta_model), recipe)
    picture = draw_picture(opened.meta_model, find_blocks(opened.meta_model)[1], choose_device(recipe.device))
    if unreached := _unreached(picture, chosen):
        left_dense |= dict.fromkeys((layer.name for layer in unreached), "text does not reach its decoder block")
        chosen = {layer: settings for layer, settings in chosen.items() if layer.name not in left_dense}
        opened.notes.append(_say_unreached(unreached, left=bool(chosen)))
        watch(Event(kind="note", phase="load", message=opened.notes[-1]))
    embedding = getattr(opened.meta_model.get_input_embeddings(), "weight", None)
    for layer, settings in chosen.items():
        if layer.weight_name not in opened.key_of or layer.module.get_parameter("weight") is embedding:
            raise ModelError(
                f"{layer.name} shares its weight with the input embedding, which cannot be pruned; leave it dense: --skip "
                f"{layer.name}"
            )
        try:
            Budget.plan(*layer.shape, settings)
        except RecipeError as error:
            raise RecipeError(f"{layer.name}: {error}") from error
    # Before all tensors are read and the calibration text is made, which may take an hour.
    if folder is not None:
        check_room(opened.checkpoint.layout, folder, besides=LOG_BYTES_PER_LAYER * len(chosen))
    sparsity = _note_zeros(opened, list(chosen), watch)
    dense, zeros = survey(opened, chosen, left_dense, watch) if look else ([], 0)
    return Prepared(opened, chosen, picture, dense, zeros, sparsity)


def _unreached(picture: Picture, layers: Iterable[LinearLayer]) -> list[LinearLayer]:
    return [layer for layer in layers if layer.block is not None and layer.block not in picture.reached]


def _say_unreached(unreached: list[LinearLayer], *, left: bool) -> str:
    """Return the note about layers in blocks that text does not reach.

    Raises:
        ModelError: no other layer is left to prune.
    """
    indices = sorted({layer.block for layer in unreached if layer.block is not None})
    blocks = f"{'block' if len(indices) == 1 else 'blocks'} {', '.join(map(str, indices))}"
    if not left:
        raise ModelError(f"the recipe leaves no layer to prune: text does not reach {blocks}")
    return f"text does not reach {blocks}: {len(unreached)} layers there stay dense"


def _note_zeros(opened: OpenedModel, layers: Sequence[LinearLayer], watch: Watcher) -> float:
    """Return the fraction of zeros in the layers before pruning. Add a note if the model was pruned before."""
    sparsity, pruned = sampled_sparsity(opened, layers)
    reported = opened.source.gguf is None and (opened.source.folder / "pruning.json").is_file()
    if reported or pruned:
        known = " (it has a pruning.json)" if reported else ""
        note = (
            f"the model is pruned already{known}: about {100 * sparsity:.1f} % of the weights of the layers to prune are zero; "
            "errors are relative to it, not to the dense model"
        )
        opened.notes.append(note)
        watch(Event(kind="note", phase="load", message=note))
    return sparsity


def check_calibration(recipe: Recipe, given: Calibration | None, source: ModelSource | None = None) -> None:
    """Check that the calibration text can be used, before a model is loaded; no check if windows are ``given``.

    With ``source``, the check includes a chat template of its tokenizer for texts that are chats.

    Raises:
        DataError: the text cannot be used.
    """
    if given is None:
        check_text_source(recipe.calibration, tokenizer=None if source is None else source.tokenizer)


def smaller_calibration(recipe: Recipe) -> str:
    """Return the advice for a run that is out of memory; see :func:`~thanos.errors.resource_errors`."""
    return f"lower --samples (now {recipe.samples}) or --sequence-length (now {recipe.sequence_length})"


def stages_of(recipe: Recipe) -> tuple[BlockStage, ...]:
    """Return the stages that a recipe runs on each block, in order."""
    return (PruneStage(measure_error=recipe.measure_error),)


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
) -> Engine:
    """Return the engine of a run; ``--plan`` tries parts of the run with it.

    Args:
        prepared: the opened model, and the layers to prune.
        recipe: gives the stages.
        ids: token ids of this process's calibration sequences, (samples, T).
        device: device on which blocks run and layers are solved.
        folder: folder for the file of hidden states, if they are kept on the disk.
        activations: storage tier of the hidden states; see :func:`~thanos.engine.activations.choose_place`.
        writer: writer of finished tensors.
        journal: journal of finished blocks.
        meter: meter of seconds and peak memory by phase.
        world: the processes that share the work.
        notes: warnings from before the loop.
    """
    opened, (name, blocks) = prepared.opened, find_blocks(prepared.opened.meta_model)
    inputs = EngineInputs(
        model=opened.meta_model,
        blocks_name=name,
        blocks=blocks,
        layers=prepared.layers,
        weights=ModelWeights(opened.meta_model, opened.checkpoint, opened.key_of, device),
        writer=writer,
        journal=journal,
        runner=Passes(opened.meta_model, blocks, ids, device, folder, place=activations, picture=prepared.picture),
        device=device,
        meter=meter,
        world=world,
    )
    return Engine(inputs, stages_of(recipe), notes=notes)
