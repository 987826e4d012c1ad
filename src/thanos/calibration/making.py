"""Calibration windows of a recipe: the text, and what the dense model generates."""

from __future__ import annotations

import torch

from thanos.calibration.continued import generate_more
from thanos.calibration.windows import Calibration, build_calibration
from thanos.checkpoint.entries import count_zeros
from thanos.events import Event, Watcher
from thanos.model.loading import check_token_ids, context_length, end_of_text_id, load_model
from thanos.model.opening import OpenedModel
from thanos.model.source import ModelSource
from thanos.recipe import Recipe


def calibrate(
    opened: OpenedModel, recipe: Recipe, device: torch.device, watch: Watcher, given: Calibration | None
) -> Calibration:
    """Make the windows, or check the windows ``given``.

    Raises DataError if there is too little text, or if the windows are not those of the recipe.
    """
    watch(Event(kind="phase", phase="calibration"))
    if given is not None:
        given.check_made_by(recipe)
        check_token_ids(given.ids, opened.meta_model)
        return given
    calibration = make_calibration(opened.source, recipe, device, watch)
    check_token_ids(calibration.ids, opened.meta_model)
    return calibration


def make_calibration(source: ModelSource, recipe: Recipe, device: torch.device, watch: Watcher) -> Calibration:
    """Make the calibration windows of a recipe with a model's own tokenizer; generate those that the recipe wants generated.

    The model generates on ``device``. Raises DataError as :func:`build_calibration`, and NumericsError if the model that
    generates holds NaN or infinity.
    """
    tokenizer, config = source.tokenizer(), source.config()
    generates = recipe.calibration == "self" or recipe.generate > 0
    dense = load_model(source, dtype=recipe.dtype, device=device) if generates else None
    if dense is not None:  # with NaN in a parameter it cannot sample tokens
        for name, parameter in dense.named_parameters():
            count_zeros(name, parameter)
    pad = end_of_text_id(tokenizer, config)
    made = build_calibration(
        recipe.calibration,
        tokenizer,
        samples=recipe.samples,
        sequence_length=recipe.sequence_length,
        seed=recipe.seed,
        end_of_text_id=pad,
        context_length=context_length(config),
        model=dense,
        on_event=watch,
    )
    return made if dense is None else generate_more(made, dense, recipe, pad, watch, tokenizer)
