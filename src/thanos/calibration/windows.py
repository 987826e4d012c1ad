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
from thanos.checkpoint.entries import count_zeros
from thanos.errors import DataError
from thanos.events import Event, Watcher
from thanos.model.bos import added_bos, plain_ids, without_bos
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
        bos: the beginning-of-text token with which each window begins, since the tokenizer begins texts so; None without.
    """

    ids: Tensor
    source: str
    rule: Rule
    seed: int
    documents: int
    bos: int | None = None

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
            "bos": self.bos,
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
    cut from its beginning for seed 0, from a place drawn from the seed for others. Where the tokenizer begins texts with a
    beginning-of-text token (BOS), that is the first token of each window, and the text fills the others.

    Args:
        source: see :mod:`thanos.calibration.text`; ``self`` needs ``model``.
        tokenizer: the model's; it tells whether windows begin with BOS, and its chat template makes text of chats.
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
    tell, bos = on_event or (lambda event: None), added_bos(tokenizer)
    if source == "self":
        if model is None:
            raise DataError("calibration 'self' needs the dense model")
        start = end_of_text_id if bos is None else bos
        ids = _generate(model, samples, sequence_length, seed, start, end_of_text_id, tell)
        return Calibration(ids, source, "generated", seed, 0, bos)
    documents = calibration_documents(
        source, tokenizer, lambda line: tell(Event(kind="note", phase="calibration", message=line))
    )
    length = sequence_length if bos is None else sequence_length - 1  # of the text in a window
    windows = _random_windows(documents, tokenizer, samples, length, seed, tell)
    if windows is not None:
        return Calibration(begin_windows(windows, bos), source, "random-window", seed, samples, bos)
    order, draw, needed = list(range(len(documents))), random.Random(seed), samples * length
    if seed:
        draw.shuffle(order)
    if seed and len(order) == 1:  # nothing to shuffle, so the windows begin anywhere in it
        ids, used = without_bos(plain_ids(tokenizer, documents[0]), bos), 1
        begin = draw.randrange(max(1, len(ids) - needed + 1))
        ids = ids[begin : begin + needed]
    else:
        ids, used = _pack((documents[i] for i in order), tokenizer, needed, end_of_text_id)
    _check_length(source, len(ids), samples, sequence_length, length)
    windows = begin_windows(torch.tensor(ids).view(samples, length), bos)
    return Calibration(windows, source, "packed", seed, used, bos)


def begin_windows(text: Tensor, bos: int | None) -> Tensor:
    """Return windows (n, T) int64 of text (n, T − 1) with a BOS before each; without one, the text as it is."""
    if bos is None:
        return text
    return torch.cat([torch.full((len(text), 1), bos), text], dim=1)


def check_positions(sequence_length: int, context_length: int | None) -> None:
    """Refuse windows beyond the positions that a model knows.

    Raises:
        DataError: they are.
    """
    if context_length is not None and sequence_length > context_length:
        raise DataError(
            f"sequence_length {sequence_length} is beyond the model's {context_length} positions; give --sequence-length "
            f"{context_length} or less"
        )


def _random_windows(
    documents: list[str],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    seed: int,
    tell: Callable[[Event], None],
) -> Tensor | None:
    """Return windows by the paper's rule; None where fewer than ``samples`` documents are long enough."""
    draw, bos = random.Random(seed), added_bos(tokenizer)
    # A token takes at least one byte, so most short documents need no tokenizer to be ruled out.
    order = [i for i, text in enumerate(documents) if len(text.encode()) > length]
    if len(order) < samples:
        return None
    draw.shuffle(order)
    windows = []
    for number, index in enumerate(order):
        if len(windows) + len(order) - number < samples:
            return None
        ids = without_bos(plain_ids(tokenizer, documents[index]), bos)
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
    used, bos = 0, added_bos(tokenizer)
    for text in documents:
        if used:
            ids.append(end_of_text_id)
        ids += without_bos(plain_ids(tokenizer, text), bos)
        used += 1
        if len(ids) >= needed:
            return ids[:needed], used
    return ids, used


def _check_length(source: str, tokens: int, samples: int, sequence_length: int, length: int) -> None:
    besides = "" if length == sequence_length else ", of which the first is the beginning-of-text token"
    if tokens < length:
        raise DataError(
            f"calibration text {source} is shorter than one sequence: {tokens} tokens, and --sequence-length is "
            f"{sequence_length}{besides}"
        )
    if tokens < samples * length:
        raise DataError(
            f"calibration text {source} gives {tokens // length} windows of {sequence_length} tokens, and --samples is "
            f"{samples}; lower --samples or --sequence-length, or give more text"
        )


def _generate(
    model: PreTrainedModel, samples: int, length: int, seed: int, start: int, pad: int, tell: Callable[[Event], None]
) -> Tensor:
    """Sample sequences from the model at temperature 1, each beginning with the token ``start``: BOS, else end-of-text."""
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
                pad_token_id=pad,
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
        check_token_ids(given.ids, opened.meta_model)
        return given
    calibration = make_calibration(opened.source, recipe, device, watch)
    check_token_ids(calibration.ids, opened.meta_model)
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
        NumericsError: a parameter of the model that generates holds NaN or infinity.
    """
    tokenizer, config = source.tokenizer(), source.config()
    dense = load_model(source, dtype=recipe.dtype, device=device) if recipe.calibration == "self" else None
    if dense is not None:  # it could draw no token from NaN
        for name, parameter in dense.named_parameters():
            count_zeros(name, parameter)
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
