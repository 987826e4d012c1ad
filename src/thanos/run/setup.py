"""Preparation and checks before a run: open the model, select its layers, check the calibration text and the disk."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from thanos._version import __version__
from thanos.calibration.prompts import check_prompts
from thanos.calibration.text import check_text_source
from thanos.calibration.windows import Calibration, check_positions
from thanos.checkpoint.writer import check_bytes, check_room
from thanos.engine.data_flow import DataFlow, trace_data_flow
from thanos.engine.routing import Routing
from thanos.errors import ModelError, RecipeError
from thanos.events import Event, Watcher
from thanos.model.layers import LinearLayer, find_blocks, linear_layers, select_layers
from thanos.model.loading import context_length, end_of_text_id, parse_dtype
from thanos.model.opening import OpenedModel, open_model
from thanos.model.source import ModelSource
from thanos.model.unused import Unused
from thanos.patterns.budget import Budget
from thanos.recipe import LayerRecipe, Recipe, check_globs
from thanos.recipe.repair import held_out_of
from thanos.run.cautions import cautions_of
from thanos.run.cut_words import cut_words, share_words, uncompensated
from thanos.run.cutting import Cutting, plan_cutting
from thanos.run.report import DenseRecord
from thanos.run.survey import sampled_sparsity, survey
from thanos.system.device import choose_device

LOG_BYTES_PER_LAYER = 4096
"""Bytes on the disk per pruned layer for the journal, the event log and the report."""


GGUF_DTYPE = "the weights are written in bfloat16; --output-dtype float32 keeps the exact values of the GGUF file"


@dataclass(frozen=True, slots=True)
class Prepared:
    """An opened model, and the selection of its layers.

    Attributes:
        opened: the model.
        layers: the layers to prune, each with its settings.
        data_flow: the data flow between the model's blocks.
        dense: record of each tensor that is not pruned.
        zeros_elsewhere: number of zeros in the tensors that are not pruned.
        sparsity: fraction of zeros in ``layers`` before pruning, estimated from a sample.
        cutting: the units to remove, if the pattern removes units; else None.
    """

    opened: OpenedModel
    layers: dict[LinearLayer, LayerRecipe]
    data_flow: DataFlow
    dense: list[DenseRecord]
    zeros_elsewhere: int
    sparsity: float
    cutting: Cutting | None = None


def checked_recipe(recipe: Any) -> Recipe:
    """Return ``recipe``, or the default recipe for None.

    Raises RecipeError if the argument is no recipe, or has a glob that can match no layer.
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

    Raises ModelError if it has no readable tokenizer, and DataError if it has fewer positions than a sequence has tokens, or
    names no end-of-text token.
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
    opened = open_model(source, recipe.dtype, _written_dtype(source, recipe.output_dtype))
    if source.gguf is not None and recipe.output_dtype == "auto":
        opened.notes.append(GGUF_DTYPE)
    return prepare_opened(opened, recipe, watch, look=look, folder=folder)


def prepare_opened(
    opened: OpenedModel, recipe: Recipe, watch: Watcher, *, look: bool = True, folder: Path | None = None
) -> Prepared:
    """Select the layers of an opened model to prune and their settings; see :func:`prepare`."""
    tensors = opened.checkpoint.tensors
    if spare := tensors.keys() - set(opened.key_of.values()):
        opened.notes.extend(Unused(opened.meta_model, tensors, opened.key_of).notes(spare))
    for note in opened.notes:
        watch(Event(kind="note", phase="load", message=note))
    cutting = None
    if recipe.parsed_pattern.unit_kinds:
        cutting, chosen, left_dense = plan_cutting(opened, recipe)
        if not cutting.is_open and not cutting.drops:
            cut = cutting.counted()
            watch(Event(kind="note", phase="load", message=f"{cut_words(cut)}: {share_words(cut)}"))
        for note in (uncompensated(chosen.values()), *cautions_of(opened, cutting)):
            if note:
                opened.notes.append(note)
                watch(Event(kind="note", phase="load", message=note))
    else:
        chosen, left_dense = select_layers(linear_layers(opened.meta_model), recipe)
    data_flow = trace_data_flow(opened.meta_model, find_blocks(opened.meta_model)[1], choose_device(recipe.device))
    if (unreached := _unreached(data_flow, chosen)) and cutting is not None:
        raise ModelError(
            f"text does not reach block {unreached[0].block}, so its units cannot be chosen, but every block must lose the "
            "same number of units"
        )
    if unreached:
        left_dense |= dict.fromkeys((layer.name for layer in unreached), "text does not reach its decoder block")
        chosen = {layer: settings for layer, settings in chosen.items() if layer.name not in left_dense}
        opened.notes.append(_unreached_note(unreached, left=bool(chosen)))
        watch(Event(kind="note", phase="load", message=opened.notes[-1]))
    _note_unpaired(opened, chosen, watch)
    _note_useless_budget(opened, chosen.values(), watch)
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
        if cutting is None:
            check_room(opened.checkpoint.layout, folder, besides=bytes_besides(chosen))
        else:
            check_bytes(cutting.bytes_after, folder, besides=bytes_besides(chosen))
    sparsity = _note_zeros(opened, list(chosen), watch)
    dense, zeros = survey(opened, chosen, left_dense, watch) if look else ([], 0)
    return Prepared(opened, chosen, data_flow, dense, zeros, sparsity, cutting)


def bytes_besides(layers: Collection[LinearLayer]) -> int:
    """Return the bytes on the disk that a run needs in addition to the output: the journal, the log and the report."""
    return LOG_BYTES_PER_LAYER * len(layers)


def _written_dtype(source: ModelSource, output_dtype: str) -> torch.dtype | None:
    """Return the dtype in which a model is written; None for the input's own dtypes."""
    if output_dtype == "auto":
        return None if source.gguf is None else torch.bfloat16
    return parse_dtype(output_dtype)


def _note_unpaired(opened: OpenedModel, layers: dict[LinearLayer, LayerRecipe], watch: Watcher) -> None:
    """Add a note on layers whose dense target is left out."""
    routing = Routing(opened.meta_model)
    left = [layer for layer, settings in layers.items() if settings.repair.retargets and not routing.covers(layer)]
    if left:
        note = (
            f"{len(left)} layers of experts, the first of them {left[0].name}, are pruned without a dense target: the model's "
            "own code sends tokens to them, so their tokens in the dense and the pruned model cannot be paired"
        )
        opened.notes.append(note)
        watch(Event(kind="note", phase="load", message=note))


def _note_useless_budget(opened: OpenedModel, settings: Iterable[LayerRecipe], watch: Watcher) -> None:
    """Add a note if layers keep their budget, but none of them has the outlier rows that this is for."""
    outlier_rows = [each.outlier_rows for each in settings if each.keep_budget]
    if outlier_rows and not any(outlier_rows):
        note = (
            "keep_budget has no effect, since no layer has outlier rows; set outlier_rows too, or leave keep_budget out"
        )
        opened.notes.append(note)
        watch(Event(kind="note", phase="load", message=note))


def _unreached(data_flow: DataFlow, layers: Iterable[LinearLayer]) -> list[LinearLayer]:
    return [layer for layer in layers if layer.block is not None and layer.block not in data_flow.reached]


def _unreached_note(unreached: list[LinearLayer], *, left: bool) -> str:
    """Return the note about layers in blocks that text does not reach. Raises ModelError if no other layer is left."""
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
        # A model that only lost units has no zeros to report.
        zeros = f": about {100 * sparsity:.1f} % of the weights of the layers to prune are zero" if sparsity else ""
        note = f"the model is pruned already{known}{zeros}; errors are relative to it, not to the dense model"
        opened.notes.append(note)
        watch(Event(kind="note", phase="load", message=note))
    return sparsity


def check_calibration(recipe: Recipe, given: Calibration | None, source: ModelSource | None = None) -> None:
    """Check that the calibration text can be used, before a model is loaded. Only the number of ``given`` windows is checked.

    If the texts are chats, the tokenizer of ``source`` must have a chat template; None skips this check. Raises DataError if
    the text cannot be used, and RecipeError if too few windows are given to hold any out.
    """
    if given is not None and recipe.holds_out:
        held_out_of(given.samples, recipe.held_out)
    if given is None:
        check_text_source(recipe.calibration, tokenizer=None if source is None else source.tokenizer)
        check_prompts(recipe, recipe.sequence_length, source)


def smaller_calibration(recipe: Recipe) -> str:
    """Return the advice for a run that is out of memory; see :func:`~thanos.errors.resource_errors`."""
    generate = f", --generate (now {recipe.generate})" if recipe.generate else ""
    return f"lower --samples (now {recipe.samples}){generate} or --sequence-length (now {recipe.sequence_length})"


def shared_facts(recipe: Recipe, opened: OpenedModel) -> dict[str, Any]:
    """Return the facts that must be equal in all processes of a run, by name."""
    import transformers

    tensors = sorted((name, str(info.dtype), info.shape) for name, info in opened.checkpoint.tensors.items())
    config = {key: value for key, value in opened.meta_model.config.to_dict().items() if key != "_name_or_path"}
    return {
        **{f"the recipe's {name}": value for name, value in recipe.to_dict().items()},
        "the model's config": hashlib.sha256(repr(sorted(config.items())).encode()).hexdigest(),
        "the list of the model's tensors": hashlib.sha256(repr(tensors).encode()).hexdigest(),
        "thanos": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
