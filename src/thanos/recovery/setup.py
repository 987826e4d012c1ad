"""Checks and descriptions before a recovery."""

from __future__ import annotations

from typing import Any

import torch

from thanos.calibration.prompts import check_prompts
from thanos.calibration.text import check_text_source
from thanos.calibration.windows import Calibration, check_positions
from thanos.errors import ModelError, RecipeError
from thanos.model.loading import context_length, end_of_text_id
from thanos.model.source import ModelSource
from thanos.recovery.pair import Pair
from thanos.recovery.recipe import RecoveryRecipe
from thanos.recovery.states import BYTES_PER_PARAMETER
from thanos.run.resume import describe_model
from thanos.system.extras import install_command, is_installed

_LOG_BYTES = 4 << 20
"""Bytes on the disk for the log and the copied files."""


def require_trainer() -> None:
    """Raise ModelError if accelerate is not installed, which transformers needs for training."""
    if not is_installed("accelerate"):
        raise ModelError(f"recovery needs the package accelerate: {install_command('recover')}")


def check_split(recipe: RecoveryRecipe, processes: int) -> None:
    """Raise RecipeError if the batch cannot be split evenly over the processes, in whole micro-batches."""
    unit = (recipe.micro_batch or 1) * processes
    if recipe.batch % unit:
        each = f" in micro-batches of {recipe.micro_batch}" if recipe.micro_batch else ""
        raise RecipeError(
            f"a batch of {recipe.batch} cannot be split over {processes} processes{each}; give --batch a multiple of {unit}"
        )


def check_shard(recipe: RecoveryRecipe, device: torch.device) -> None:
    """Raise RecipeError if the recipe shards on a CPU, where accelerate would silently copy the model instead."""
    if recipe.shard and device.type != "cuda":
        raise RecipeError("shard needs CUDA devices; leave --shard out, so that each process holds a copy of the model")


def checked_recipe(recipe: Any) -> RecoveryRecipe:
    """Return ``recipe``, or the default recipe for None. Raise RecipeError for any other type."""
    if recipe is None:
        return RecoveryRecipe()
    if not isinstance(recipe, RecoveryRecipe):
        raise RecipeError(
            f"recipe must be a thanos.RecoveryRecipe, such as RecoveryRecipe(epochs=4); got {type(recipe).__name__} "
            f"{str(recipe)[:60]!r}"
        )
    return recipe


def memory_advice(recipe: RecoveryRecipe) -> tuple[str, ...]:
    """Return the advice for a run that is out of memory; see :func:`~thanos.errors.resource_errors`."""
    lower = [] if recipe.micro_batch == 1 else ["give --micro-batch 1"]
    return (*lower, f"lower --sequence-length (now {recipe.sequence_length})")


def describe_models(source: ModelSource, parent: ModelSource) -> dict[str, Any]:
    """Return the descriptions of both models' files, by file name."""
    return describe_model(source) | {f"dense {name}": value for name, value in describe_model(parent).items()}


def bytes_besides(pair: Pair) -> int:
    """Return the bytes on the disk in addition to the output's weights: two checkpoints, two best states, and the log."""
    layout = pair.pruned.checkpoint.layout
    parameters = sum(info.numel for info in pair.pruned.checkpoint.tensors.values())
    return BYTES_PER_PARAMETER * parameters + 2 * layout.nbytes + _LOG_BYTES


def check_text(recipe: RecoveryRecipe, parent: ModelSource, given: Calibration | None) -> None:
    """Raise DataError if the text cannot be used. No weight is read."""
    if given is None:
        config = parent.config()
        check_positions(recipe.sequence_length, context_length(config))
        end_of_text_id(parent.tokenizer(), config)
        check_text_source(recipe.calibration, tokenizer=parent.tokenizer)
    check_prompts(recipe, recipe.sequence_length, parent)
