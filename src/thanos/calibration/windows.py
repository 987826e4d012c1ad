"""Calibration windows: the token ids on which the model runs during pruning, the rule by which they were made, and a hash."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from thanos.calibration.generation import generate
from thanos.calibration.text import calibration_documents, files_sha256
from thanos.errors import DataError
from thanos.events import Event
from thanos.model.bos import added_bos, plain_ids, without_bos
from thanos.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Rule = Literal["random-window", "packed", "generated", "given"]


GIVEN_TEXTS, GIVEN_TOKENS = "texts", "tokens"
"""Names of sources that are no files: texts or token ids of the caller."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Windows of token ids.

    Attributes:
        ids: the token ids, (samples, sequence_length) int64, on the CPU.
        source: the source of the text, as the user named it.
        rule: how the windows were made. ``random-window`` (the paper's rule): a random window of a random document that is
            longer than the window; each document is used at most once. ``packed``: documents in order, joined by the
            end-of-text token and cut into windows in order. ``generated``: sampled from the dense model. ``given``: token ids
            of the caller.
        seed: seed of the random draw.
        documents: number of documents used.
        bos_ids: ids of the tokens at the start of each window: those with which the tokenizer begins a text, mostly one, the
            beginning-of-text token (BOS); empty if it adds none to texts.
        generated: number of additional sequences, the first ones, that the dense model generated as continuations of pieces of
            the text, or of prompts; see :mod:`thanos.calibration.continued`.
        prompts_sha256: hash of the files of these prompts; None if there are none.
    """

    ids: Tensor
    source: str
    rule: Rule
    seed: int
    documents: int
    bos_ids: tuple[int, ...] = ()
    generated: int = 0
    prompts_sha256: str | None = None

    @property
    def samples(self) -> int:
        """Number of windows of the text."""
        return len(self.ids) - self.generated

    @property
    def sha256(self) -> str:
        """SHA-256 of the shape and the ids (little-endian int64, row by row)."""
        digest = hashlib.sha256(repr(tuple(self.ids.shape)).encode())
        digest.update(self.ids.contiguous().numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def check_made_by(self, recipe: Recipe) -> None:
        """Raise DataError if a recipe would make other windows: its source, shape, seed or prompts differ."""
        made = (self.source, self.samples, self.ids.shape[1], self.seed, self.generated)
        wanted = (recipe.calibration, recipe.samples, recipe.sequence_length, recipe.seed, recipe.generate)
        if made != wanted:
            raise DataError(
                f"the given calibration is (source, samples, sequence_length, seed, generate) {made}, but the recipe says "
                f"{wanted}; make it with the recipe's settings, or leave it out"
            )
        prompts = None if recipe.prompts is None else files_sha256(recipe.prompts)
        if self.prompts_sha256 != prompts:
            raise DataError(
                f"the given calibration continues prompts with the SHA-256 {self.prompts_sha256}, but those of the recipe have "
                f"{prompts}; make it with the recipe's prompts, or leave it out"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the entries of the report."""
        return {
            "source": self.source,
            "rule": self.rule,
            "seed": self.seed,
            "documents": self.documents,
            "samples": self.samples,
            **({"generated": self.generated} if self.generated else {}),
            **({"prompts_sha256": self.prompts_sha256} if self.prompts_sha256 else {}),
            "sequence_length": self.ids.shape[1],
            "tokens": self.ids.numel(),
            "bos_ids": list(self.bos_ids),
            "sha256": self.sha256,
        }


def check_is_calibration(given: Any) -> None:
    """Raise DataError if the argument ``calibration`` of a run is neither windows nor None."""
    if given is not None and not isinstance(given, Calibration):
        raise DataError(
            "calibration must be windows from thanos.calibration.windows.build_calibration; got "
            f"{type(given).__name__} {str(given)[:60]!r}; a source of text belongs into the recipe: calibration='text.jsonl'"
        )


def build_calibration(
    source: str | Sequence[str],
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

    If enough documents are longer than a window, each gives one random window; documents are tried in random order. Otherwise
    documents are packed: in their own order for seed 0, in an order drawn from the seed for other seeds. A single document is
    cut from its beginning for seed 0, from an offset drawn from the seed for other seeds. If the tokenizer begins texts with
    a beginning-of-text token (BOS), or several, each window begins with them, and the text fills the rest.

    Args:
        source: see :mod:`thanos.calibration.text`; ``self`` needs ``model``. Or the documents themselves.
        tokenizer: the model's: it determines whether windows begin with BOS; its chat template turns chats into text.
        samples: number of windows.
        sequence_length: number of tokens in a window.
        seed: seed of the random draw. The global random state is neither read nor changed.
        end_of_text_id: id of the token that joins packed documents.
        context_length: number of the model's positions; longer windows are refused. None for no limit.
        model: the dense model, for source ``self``.
        on_event: called with events: the progress, and notes.

    Raises:
        DataError: too little text, or a sequence longer than the model's positions.
    """
    check_positions(sequence_length, context_length)
    emit, bos = on_event or (lambda event: None), added_bos(tokenizer)
    check_room(sequence_length, bos)
    if isinstance(source, str) and source == "self":
        if model is None:
            raise DataError("calibration 'self' needs the dense model")
        start = bos or (end_of_text_id,)
        ids = generate(model, samples, sequence_length, seed, start, emit)
        return Calibration(ids, source, "generated", seed, 0, bos)
    if isinstance(source, str):
        documents = calibration_documents(
            source, tokenizer, lambda line: emit(Event(kind="note", phase="calibration", message=line))
        )
    else:
        documents, source = [text for text in source if text.strip()], GIVEN_TEXTS
    length = sequence_length - len(bos)  # tokens of text in a window
    windows = _random_windows(documents, tokenizer, samples, length, seed, emit)
    if windows is not None:
        return Calibration(begin_windows(windows, bos), source, "random-window", seed, samples, bos)
    order, draw, needed = list(range(len(documents))), random.Random(seed), samples * length
    if seed:
        draw.shuffle(order)
    if seed and len(order) == 1:  # nothing to shuffle: the seed draws the offset of the first window
        ids, used = without_bos(plain_ids(tokenizer, documents[0]), bos), 1
        begin = draw.randrange(max(1, len(ids) - needed + 1))
        ids = ids[begin : begin + needed]
    else:
        ids, used = _pack((documents[i] for i in order), tokenizer, needed, end_of_text_id)
    _check_length(source, len(ids), samples, sequence_length, length)
    windows = begin_windows(torch.tensor(ids).view(samples, length), bos)
    return Calibration(windows, source, "packed", seed, used, bos)


def begin_windows(text: Tensor, bos: tuple[int, ...]) -> Tensor:
    """Return windows (n, T) int64: the b tokens ``bos`` before each row of ``text`` (n, T − b)."""
    return torch.cat([torch.tensor(bos, dtype=text.dtype).expand(len(text), -1), text], dim=1)


def all_begin(ids: Tensor, bos: tuple[int, ...]) -> bool:
    """Return whether all windows, (n, T), begin with the tokens ``bos`` and have others after them."""
    return 0 < len(bos) < ids.shape[1] and bool((ids[:, : len(bos)] == torch.tensor(bos)).all())


def check_room(sequence_length: int, bos: tuple[int, ...]) -> None:
    """Raise DataError for windows that hold nothing but the tokens with which the tokenizer begins a text."""
    if sequence_length <= len(bos):
        raise DataError(
            f"sequence_length {sequence_length} leaves no room for text: the tokenizer begins a text with {say_bos(bos)}; "
            f"give {len(bos) + 1} or more"
        )


def say_bos(bos: tuple[int, ...]) -> str:
    """Return words for the tokens with which a tokenizer begins a text: their number and their ids."""
    what = "the beginning-of-text token" if len(bos) == 1 else f"{len(bos)} tokens"
    return f"{what} ({', '.join(map(str, bos))})"


def check_positions(sequence_length: int, context_length: int | None) -> None:
    """Raise DataError for windows that are longer than a model's number of positions; None for no limit."""
    if context_length is not None and sequence_length > context_length:
        raise DataError(
            f"sequence_length {sequence_length} is beyond the model's {context_length} positions; give {context_length} "
            "or less"
        )


def _random_windows(
    documents: list[str],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    seed: int,
    emit: Callable[[Event], None],
) -> Tensor | None:
    """Return windows by the paper's rule, (samples, length); None if fewer than ``samples`` documents are long enough."""
    draw, bos = random.Random(seed), added_bos(tokenizer)
    # A token takes at least one byte: this rules out most short documents without the tokenizer.
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
            emit(Event(kind="progress", phase="calibration", done=len(windows), total=samples))
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


def besides_text(tokens: int) -> str:
    """Return the end of an error line: how many tokens of a window are BOS and no text."""
    if not tokens:
        return ""
    first = "first is the beginning-of-text token" if tokens == 1 else f"first {tokens} are the tokenizer's own"
    return f", of which the {first}"


def _check_length(source: str, tokens: int, samples: int, sequence_length: int, length: int) -> None:
    besides = besides_text(sequence_length - length)
    if tokens < length:
        raise DataError(
            f"calibration text {source} is shorter than one sequence: {tokens} {'token' if tokens == 1 else 'tokens'}, but "
            f"--sequence-length is {sequence_length}{besides}; lower --sequence-length, or give more text"
        )
    if tokens < samples * length:
        raise DataError(
            f"calibration text {source} gives {tokens // length} {'window' if tokens < 2 * length else 'windows'} of "
            f"{sequence_length} tokens, but --samples is "
            f"{samples}; lower --samples or --sequence-length, or give more text"
        )
