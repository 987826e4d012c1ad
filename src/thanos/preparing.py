"""What is known and checked before a run's work begins: the model opened, its layers chosen, its calibration windows made."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from thanos.calibration import Calibration, build_calibration
from thanos.errors import ModelError, NumericsError, RecipeError, ResourceError, system_errors
from thanos.events import Event
from thanos.opening import OpenedModel, open_model
from thanos.picture import Picture, draw_picture
from thanos.pretrained import ModelSource, check_token_ids, choose_device, context_length, end_of_text_id, load_model
from thanos.recipe import Recipe
from thanos.report import DenseRecord
from thanos.shards import check_room
from thanos.solvers.base import Budget
from thanos.structure import LinearLayer, find_blocks, linear_layers, select_layers

Watcher = Callable[[Event], None]

LOG_BYTES_PER_LAYER = 4096
"""Room on the disk for the journal, the event log and the report."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """An opened model, what text does in it, and what is to be done to it."""

    opened: OpenedModel
    layers: list[LinearLayer]
    picture: Picture
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
        ModelError, RecipeError: the recipe does not fit the model, or its blocks cannot be run one by one.
        NumericsError: a tensor that stays holds NaN or infinity.
        ResourceError: the disk has too little room.
    """
    opened = open_model(source, recipe.dtype)
    for note in opened.notes:
        watch(Event(kind="note", phase="load", message=note))
    chosen, left_dense = select_layers(linear_layers(opened.skeleton), recipe)
    picture = draw_picture(opened.skeleton, find_blocks(opened.skeleton)[1], choose_device(recipe.device))
    if unreached := _unreached(picture, chosen):
        left_dense |= dict.fromkeys((layer.name for layer in unreached), "text does not reach its decoder block")
        chosen = [layer for layer in chosen if layer.name not in left_dense]
        opened.notes.append(_say_unreached(unreached, chosen))
        watch(Event(kind="note", phase="load", message=opened.notes[-1]))
    embedding = getattr(opened.skeleton.get_input_embeddings(), "weight", None)
    for layer in chosen:
        settings = recipe.for_layer(layer.name)
        assert settings is not None
        if layer.weight_name not in opened.key_of or layer.module.get_parameter("weight") is embedding:
            raise ModelError(
                f"{layer.name} shares its weight with the input embedding, which cannot be pruned; skip it"
            )
        try:
            Budget.plan(*layer.shape, settings)
        except RecipeError as error:
            raise RecipeError(f"{layer.name}: {error}") from error
    if folder is not None:  # now, not after reading all tensors and making the calibration text, which may take an hour
        check_room(opened.checkpoint, folder, besides=LOG_BYTES_PER_LAYER * len(chosen))
    return Prepared(opened, chosen, picture, *(_survey(opened, chosen, left_dense) if survey else ([], 0)))


def _unreached(picture: Picture, layers: list[LinearLayer]) -> list[LinearLayer]:
    return [layer for layer in layers if layer.block is not None and layer.block not in picture.reached]


def _say_unreached(unreached: list[LinearLayer], chosen: list[LinearLayer]) -> str:
    """Return a line about the layers of blocks that text does not reach.

    Raises:
        ModelError: no other layer is left to prune.
    """
    indices = sorted({layer.block for layer in unreached if layer.block is not None})
    blocks = f"{'block' if len(indices) == 1 else 'blocks'} {', '.join(map(str, indices))}"
    if not chosen:
        raise ModelError(f"the recipe leaves no layer to prune: text does not reach {blocks}")
    return f"text does not reach {blocks}: {len(unreached)} layers there stay dense"


def _survey(
    opened: OpenedModel, layers: list[LinearLayer], left_dense: dict[str, str]
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


def calibrate(
    opened: OpenedModel, recipe: Recipe, device: torch.device, watch: Watcher, given: Calibration | None
) -> Calibration:
    """Make the windows, or check those that are given.

    Raises:
        DataError: the text does not suffice, or the windows are not the recipe's.
    """
    watch(Event(kind="phase", phase="calibration"))
    if given is not None:
        given.check_made_by(recipe)
        check_token_ids(given.ids, opened.skeleton)
        return given
    calibration = make_calibration(opened.source, recipe, device, watch)
    check_token_ids(calibration.ids, opened.skeleton)
    return calibration


def make_calibration(source: ModelSource, recipe: Recipe, device: torch.device, watch: Watcher) -> Calibration:
    """Make the calibration windows that a recipe asks for, with a model's own tokenizer.

    Args:
        source: the model.
        recipe: source of the text, shape, seed and dtype.
        device: where the model generates, for calibration ``self``.
        watch: is told about progress.

    Raises:
        DataError: see :func:`~thanos.calibration.build_calibration`.
    """
    tokenizer, config = source.tokenizer(), source.config()
    dense = load_model(source, dtype=recipe.dtype, device=device) if recipe.calibration == "self" else None
    return build_calibration(
        recipe.calibration,
        tokenizer,
        samples=recipe.samples,
        sequence_length=recipe.sequence_length,
        seed=recipe.seed,
        end_of_text_id=end_of_text_id(tokenizer, config),
        context_length=context_length(config),
        model=dense,
        on_event=watch,
    )


@contextmanager
def resource_errors(recipe: Recipe) -> Iterator[None]:
    """Turn exhausted memory and disk into errors that say which setting to lower."""
    lower = f"lower --samples (now {recipe.samples}) or --sequence-length (now {recipe.sequence_length})"
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceError(f"out of memory on the device: {lower}, or use --device cpu") from error
    except MemoryError as error:
        raise ResourceError(f"out of memory on the host: {lower}") from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error) or "not enough memory" in str(error):
            raise ResourceError(f"out of memory on the host: {lower}") from error
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ResourceError("disk full while writing; free some space, or write OUT to another disk") from error
        with system_errors():
            raise
