"""The calibration windows of a model in memory: token ids, texts or a source of text that the caller gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from thanos.calibration.continued import generate_more
from thanos.calibration.text import check_text_source
from thanos.calibration.windows import (
    GIVEN_TEXTS,
    GIVEN_TOKENS,
    Calibration,
    all_begin,
    build_calibration,
    check_positions,
)
from thanos.errors import DataError
from thanos.events import Watcher
from thanos.model.bos import added_bos
from thanos.model.loading import context_length, end_of_text_id
from thanos.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def given_windows(
    model: PreTrainedModel, given: Any, recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None, emit: Watcher
) -> tuple[Calibration, Recipe]:
    """Return the calibration windows, and the recipe that describes them.

    Args:
        model: the loaded model, which generates text if the recipe wants it.
        given: token ids, texts or a source of text, as :func:`~thanos.run.in_memory.prune_model` takes them.
        recipe: the recipe.
        tokenizer: the model's; texts need it.
        emit: function that is called with events.

    Raises DataError if there is too little text, or if the argument is neither token ids nor texts.
    """
    positions = context_length(model.config)
    if isinstance(given, Tensor) or (isinstance(given, list | tuple) and given and isinstance(given[0], Tensor)):
        ids = _token_ids(given)
        check_positions(ids.shape[1], positions)
        recipe = recipe.replace(calibration=GIVEN_TOKENS, samples=len(ids), sequence_length=ids.shape[1])
        named = getattr(model.config, "bos_token_id", None)
        bos = added_bos(tokenizer) if tokenizer is not None else (named,) if isinstance(named, int) else ()
        windows = Calibration(ids, GIVEN_TOKENS, "given", recipe.seed, len(ids), bos if all_begin(ids, bos) else ())
        with _evaluating(model):
            return generate_more(windows, model, recipe, 0, emit, tokenizer), recipe
    texts = isinstance(given, list | tuple) and bool(given) and all(isinstance(text, str) for text in given)
    if not texts and not isinstance(given, str):
        raise DataError(
            "calibration must be token ids (a tensor or a list of tensors), a list of texts, or a source of text such as "
            f"{recipe.calibration!r}; got {type(given).__name__} {str(given)[:60]!r}"
        )
    if tokenizer is None:
        raise DataError(
            "calibration by text needs the model's tokenizer: give tokenizer=AutoTokenizer.from_pretrained(...)"
        )
    if isinstance(given, str):
        check_text_source(given, tokenizer=lambda: tokenizer)
    with _evaluating(model):
        windows = build_calibration(
            given,
            tokenizer,
            samples=recipe.samples,
            sequence_length=recipe.sequence_length,
            seed=recipe.seed,
            end_of_text_id=end_of_text_id(tokenizer, model.config),
            context_length=positions,
            model=model,
            on_event=emit,
        )
        windows = generate_more(windows, model, recipe, end_of_text_id(tokenizer, model.config), emit, tokenizer)
    recipe = recipe.replace(calibration=GIVEN_TEXTS if texts else given)
    return replace(windows, source=recipe.calibration), recipe


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _token_ids(given: Tensor | Sequence[Tensor]) -> Tensor:
    """Return token ids as one tensor (samples, T) int64 on the CPU."""
    rows = [given] if isinstance(given, Tensor) else list(given)
    rows = [row[None] if isinstance(row, Tensor) and row.dim() == 1 else row for row in rows]
    if not all(isinstance(row, Tensor) and row.dim() == 2 and not row.is_floating_point() for row in rows):
        raise DataError("token ids must be whole numbers: a tensor (samples, T), or a list of tensors (T,)")
    if not sum(len(row) for row in rows):
        raise DataError(f"there is no calibration sequence: the token ids have shape {tuple(rows[0].shape)}")
    lengths = sorted({row.shape[1] for row in rows})
    if len(lengths) > 1 or lengths[0] < 2:
        raise DataError(f"the calibration sequences must have one length, at least 2 tokens; got lengths {lengths}")
    return torch.cat([row.to("cpu", torch.int64) for row in rows])
