"""Calibration windows: token ids that the model is run on while it is pruned, with the rule that made them and a hash."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from thanos.calibration.text import calibration_documents
from thanos.errors import DataError
from thanos.events import Event, Watcher
from thanos.model.loading import check_token_ids, context_length, end_of_text_id, load_model
from thanos.model.opening import OpenedModel
from thanos.model.source import ModelSource
from thanos.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Rule = Literal["random-window", "packed", "generated"]


_GENERATION_BATCH = 16


@dataclass(frozen=True, slots=True)
class Calibration:
    """Windows of token ids.

    Attributes:
        ids: (samples, sequence_length) int64, on the CPU.
        source: as the user named it.
        rule: ``random-window``: a random document longer than the window, a random window in it, each document at most once
            (the paper's rule); ``packed``: documents in order, joined by the end-of-text token, cut in order;
            ``generated``: sampled from the dense model.
        seed: of the draw.
        documents: number of documents used.
    """

    ids: Tensor
    source: str
    rule: Rule
    seed: int
    documents: int

    @property
    def sha256(self) -> str:
        """Hash of the shape and the ids (little-endian int64, row by row)."""
        digest = hashlib.sha256(repr(tuple(self.ids.shape)).encode())
        digest.update(self.ids.contiguous().numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def check_made_by(self, recipe: Recipe) -> None:
        """Refuse windows other than those that a recipe would make.

        Raises:
            DataError: source, shape or seed differ.
        """
        made = (self.source, *self.ids.shape, self.seed)
        asked = (recipe.calibration, recipe.samples, recipe.sequence_length, recipe.seed)
        if made != asked:
            raise DataError(
                f"the calibration given is (source, samples, sequence_length, seed) {made}, but the recipe says {asked}; make "
                "it with the recipe's settings, or leave it out"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return what the report records."""
        samples, length = self.ids.shape
        return {
            "source": self.source,
            "rule": self.rule,
            "seed": self.seed,
            "documents": self.documents,
            "samples": samples,
            "sequence_length": length,
            "tokens": samples * length,
            "sha256": self.sha256,
        }


def build_calibration(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    sequence_length: int,
    seed: int,
    end_of_text_id: int,
    context_length: int | None = None,
    model: PreTrainedModel | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Calibration:
    """Make calibration windows from a source.

    Documents are tried in random order; where enough are longer than the window, each gives one random window. Otherwise
    documents are packed: in their own order for seed 0, in an order drawn from the seed for others; a single document is
    cut from its beginning for seed 0, from a place drawn from the seed for others.

    Args:
        source: see :mod:`thanos.calibration.text`; ``self`` needs ``model``.
        tokenizer: the model's.
        samples: number of windows.
        sequence_length: tokens per window.
        seed: of the draw; the global random state is neither read nor changed.
        end_of_text_id: joins packed documents.
        context_length: positions that the model knows; longer windows are refused.
        model: the dense model, for ``self``.
        on_event: is told about progress.

    Raises:
        DataError: too little text, or a sequence longer than the model's positions.
    """
    check_positions(sequence_length, context_length)
    tell = on_event or (lambda event: None)
    if source == "self":
        if model is None:
            raise DataError("calibration 'self' needs the dense model")
        return Calibration(
            _generate(model, samples, sequence_length, seed, end_of_text_id, tell), source, "generated", seed, 0
        )
    documents = calibration_documents(source)
    windows = _random_windows(documents, tokenizer, samples, sequence_length, seed, tell)
    if windows is not None:
        return Calibration(windows, source, "random-window", seed, samples)
    order, draw, needed = list(range(len(documents))), random.Random(seed), samples * sequence_length
    if seed:
        draw.shuffle(order)
    if seed and len(order) == 1:  # nothing to shuffle, so the windows begin anywhere in it
        ids, used = _tokens(tokenizer, documents[0]), 1
        begin = draw.randrange(max(1, len(ids) - needed + 1))
        ids = ids[begin : begin + needed]
    else:
        ids, used = _pack((documents[i] for i in order), tokenizer, needed, end_of_text_id)
    _check_length(source, len(ids), samples, sequence_length)
    return Calibration(torch.tensor(ids).view(samples, sequence_length), source, "packed", seed, used)


def check_positions(sequence_length: int, context_length: int | None) -> None:
    """Refuse windows beyond the positions that a model knows.

    Raises:
        DataError: they are.
    """
    if context_length is not None and sequence_length > context_length:
        raise DataError(
            f"sequence_length {sequence_length} is beyond the model's {context_length} positions; lower --sequence-length"
        )


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[return-value]


def _random_windows(
    documents: list[str],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    seed: int,
    tell: Callable[[Event], None],
) -> Tensor | None:
    """Return windows by the paper's rule; None where fewer than ``samples`` documents are long enough."""
    draw = random.Random(seed)
    # A token takes at least one byte, so most short documents need no tokenizer to be ruled out.
    order = [i for i, text in enumerate(documents) if len(text.encode()) > length]
    if len(order) < samples:
        return None
    draw.shuffle(order)
    windows = []
    for number, index in enumerate(order):
        if len(windows) + len(order) - number < samples:
            return None
        ids = _tokens(tokenizer, documents[index])
        if len(ids) > length:
            start = draw.randrange(len(ids) - length)
            windows.append(ids[start : start + length])
            tell(Event(kind="progress", phase="calibration", done=len(windows), total=samples))
        if len(windows) == samples:
            return torch.tensor(windows)
    return None


def _pack(
    documents: Iterator[str], tokenizer: PreTrainedTokenizerBase, needed: int, end_of_text_id: int
) -> tuple[list[int], int]:
    ids: list[int] = []
    used = 0
    for text in documents:
        if used:
            ids.append(end_of_text_id)
        ids += _tokens(tokenizer, text)
        used += 1
        if len(ids) >= needed:
            return ids[:needed], used
    return ids, used


def _check_length(source: str, tokens: int, samples: int, length: int) -> None:
    if tokens < length:
        raise DataError(
            f"calibration text {source} is shorter than one sequence: {tokens} tokens, and --sequence-length is {length}"
        )
    if tokens < samples * length:
        raise DataError(
            f"calibration text {source} gives {tokens // length} windows of {length} tokens, and --samples is {samples}; lower "
            "--samples or --sequence-length, or give more text"
        )


def _generate(
    model: PreTrainedModel, samples: int, length: int, seed: int, start: int, tell: Callable[[Event], None]
) -> Tensor:
    """Sample sequences from the model at temperature 1, each beginning with the end-of-text token."""
    batches = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode():
        torch.manual_seed(seed)
        for first in range(0, samples, _GENERATION_BATCH):
            size = min(_GENERATION_BATCH, samples - first)
            prompt = torch.full((size, 1), start, device=model.device)
            ids = model.generate(  # type: ignore[operator]
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=length - 1,
                max_new_tokens=length - 1,
                pad_token_id=start,
            )
            batches.append(ids.cpu())
            tell(
                Event(
                    kind="progress",
                    phase="calibration",
                    done=first + size,
                    total=samples,
                    tokens=(first + size) * length,
                )
            )
    return torch.cat(batches)


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
        DataError: see :func:`~thanos.calibration.windows.build_calibration`.
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
