"""What is known and checked before a run's work begins: the model opened, its layers chosen, its calibration windows made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from thanos.checkpoint.writer import check_room
from thanos.engine.stages.base import BlockStage
from thanos.engine.stages.prune import PruneStage
from thanos.errors import ModelError, NumericsError, RecipeError
from thanos.events import Event, Watcher
from thanos.model.layers import LinearLayer, linear_layers, select_layers
from thanos.model.opening import OpenedModel, open_model
from thanos.model.source import ModelSource
from thanos.recipe import LayerRecipe, Recipe
from thanos.run.report import DenseRecord
from thanos.solvers.budget import Budget

LOG_BYTES_PER_LAYER = 4096
"""Room on the disk for the journal, the event log and the report."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """An opened model, and what is to be done to it: the layers to prune, each with its settings."""

    opened: OpenedModel
    layers: dict[LinearLayer, LayerRecipe]
    dense: list[DenseRecord]
    zeros_elsewhere: int


def prepare(
    source: ModelSource, recipe: Recipe, watch: Watcher, *, survey: bool = True, folder: Path | None = None
) -> Prepared:
    """Open a model and work out what a recipe does to it; ``survey`` also reads every tensor that stays.

    Args:
        source: the model.
        recipe: what to do.
        watch: is told about progress.
        survey: whether to read them.
        folder: of the output, whose disk is checked for room before anything is read; None to leave that out.

    Raises:
        ModelError, RecipeError: the recipe does not fit the model.
        NumericsError: a tensor that stays holds NaN or infinity.
        ResourceError: the disk has too little room.
    """
    opened = open_model(source, recipe.dtype)
    for note in opened.notes:
        watch(Event(kind="note", phase="load", message=note))
    chosen, left_dense = select_layers(linear_layers(opened.skeleton), recipe)
    for layer, settings in chosen.items():
        if layer.weight_name not in opened.key_of:
            raise ModelError(
                f"{layer.name} shares its weight with the input embedding, which cannot be pruned; skip it"
            )
        try:
            Budget.plan(*layer.shape, settings)
        except RecipeError as error:
            raise RecipeError(f"{layer.name}: {error}") from error
    if folder is not None:  # now, not after reading all tensors and making the calibration text, which may take an hour
        check_room(opened.checkpoint, folder, besides=LOG_BYTES_PER_LAYER * len(chosen))
    return Prepared(opened, chosen, *(_survey(opened, chosen, left_dense) if survey else ([], 0)))


def _survey(
    opened: OpenedModel, layers: Iterable[LinearLayer], left_dense: dict[str, str]
) -> tuple[list[DenseRecord], int]:
    """Read every tensor that stays: count its zeros, and refuse NaN and infinity before the work rather than after."""
    pruned = {opened.key_of[layer.weight_name] for layer in layers}
    named = {key: parameter for parameter, key in opened.key_of.items()}
    dense, zeros = [], 0
    for key, info in opened.checkpoint.tensors.items():
        if key in pruned:
            continue
        name = named.get(key, key)
        zeros += sum(count_zeros(name, part) for part in opened.checkpoint.pieces(key))
        reason = left_dense.get(name.removesuffix(".weight"), "not a linear layer's weight")
        dense.append(DenseRecord(name=name, parameters=info.numel, reason=reason))
    return dense, zeros


def count_zeros(name: str, part: Tensor) -> int:
    """Return the zeros of a part of a tensor.

    Raises:
        NumericsError: it holds NaN or infinity.
    """
    wide = part.dtype.itemsize > 1
    # Matrices of flags would fragment the heap, more with every block. The sum of finite entries may overflow, but NaN or
    # infinity never makes it finite.
    finite = not part.is_floating_point() or (wide and bool(torch.isfinite(part.sum())))
    if not finite and not bool(torch.isfinite(part).all()):
        raise NumericsError(f"{name} holds NaN or infinity; the checkpoint is damaged: download or save it again")
    return part.numel() - int(torch.count_nonzero(part)) if wide else int((part == 0).sum())


def smaller_calibration(recipe: Recipe) -> str:
    """Return what a person can do when a run is out of memory; see :func:`~thanos.errors.resource_errors`."""
    return f"lower --samples (now {recipe.samples}) or --sequence-length (now {recipe.sequence_length})"


def stages_of(recipe: Recipe) -> tuple[BlockStage, ...]:
    """Return what a recipe does to each block, in order."""
    return (PruneStage(measure_error=recipe.measure_error),)
