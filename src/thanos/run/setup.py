"""What is known and checked before a run's work begins: the model opened, its layers chosen, its calibration windows made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thanos.calibration.text import check_text_source
from thanos.calibration.windows import Calibration, check_positions
from thanos.checkpoint.writer import check_room
from thanos.engine.picture import Picture, draw_picture
from thanos.engine.stages.base import BlockStage
from thanos.engine.stages.prune import PruneStage
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

LOG_BYTES_PER_LAYER = 4096
"""Room on the disk for the journal, the event log and the report."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """An opened model, and what is to be done to it.

    Attributes:
        opened: the model.
        layers: what is pruned, each with its settings.
        picture: what text does in the model.
        dense: each tensor that stays, and why.
        zeros_elsewhere: number of zeros in those that stay.
        sparsity: share of zeros that ``layers`` come with, from a sample.
    """

    opened: OpenedModel
    layers: dict[LinearLayer, LayerRecipe]
    picture: Picture
    dense: list[DenseRecord]
    zeros_elsewhere: int
    sparsity: float


def checked_recipe(recipe: Any) -> Recipe:
    """Return a recipe, the default one for None.

    Raises:
        RecipeError: it is something else, or has a glob that can match no layer.
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
    """Refuse a model with which no calibration text can be read, before its weights are.

    Raises:
        ModelError: it has no tokenizer that can be read.
        DataError: its positions are fewer than the sequences are long, or it names no end-of-text token.
    """
    config = source.config()
    check_positions(recipe.sequence_length, context_length(config))
    end_of_text_id(source.tokenizer(), config)


def prepare(
    source: ModelSource, recipe: Recipe, watch: Watcher, *, look: bool = True, folder: Path | None = None
) -> Prepared:
    """Open a model and work out what a recipe does to it; ``look`` also reads every tensor that stays.

    Args:
        source: the model.
        recipe: what to do.
        watch: is told about progress.
        look: whether to read them.
        folder: of the output, whose disk is checked for room before anything is read; None to leave that out.

    Raises:
        ModelError, RecipeError: the recipe does not fit the model, or its blocks cannot be run one by one.
        NumericsError: a parameter that stays holds NaN or infinity.
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
    if folder is not None:  # now, not after reading all tensors and making the calibration text, which may take an hour
        check_room(opened.checkpoint.layout, folder, besides=LOG_BYTES_PER_LAYER * len(chosen))
    sparsity = _note_zeros(opened, list(chosen), watch)
    dense, zeros = survey(opened, chosen, left_dense, watch) if look else ([], 0)
    return Prepared(opened, chosen, picture, dense, zeros, sparsity)


def _unreached(picture: Picture, layers: Iterable[LinearLayer]) -> list[LinearLayer]:
    return [layer for layer in layers if layer.block is not None and layer.block not in picture.reached]


def _say_unreached(unreached: list[LinearLayer], *, left: bool) -> str:
    """Return a line about the layers of blocks that text does not reach.

    Raises:
        ModelError: no other layer is left to prune.
    """
    indices = sorted({layer.block for layer in unreached if layer.block is not None})
    blocks = f"{'block' if len(indices) == 1 else 'blocks'} {', '.join(map(str, indices))}"
    if not left:
        raise ModelError(f"the recipe leaves no layer to prune: text does not reach {blocks}")
    return f"text does not reach {blocks}: {len(unreached)} layers there stay dense"


def _note_zeros(opened: OpenedModel, layers: Sequence[LinearLayer], watch: Watcher) -> float:
    """Return the share of zeros that the layers come with, and tell of it where the model was pruned before."""
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
    """Refuse a calibration text that cannot be used, before a model is loaded; with ``source`` also chats without a template.

    Raises:
        DataError: it cannot.
    """
    if given is None:
        check_text_source(recipe.calibration, tokenizer=None if source is None else source.tokenizer)


def smaller_calibration(recipe: Recipe) -> str:
    """Return what a person can do when a run is out of memory; see :func:`~thanos.errors.resource_errors`."""
    return f"lower --samples (now {recipe.samples}) or --sequence-length (now {recipe.sequence_length})"


def stages_of(recipe: Recipe) -> tuple[BlockStage, ...]:
    """Return what a recipe does to each block, in order."""
    return (PruneStage(measure_error=recipe.measure_error),)
