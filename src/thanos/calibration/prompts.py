"""Prompts in local files: the dense model continues them to generate text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch

from thanos.calibration.text import files_sha256, texts_of
from thanos.calibration.text_files import SUFFIXES, find_files
from thanos.calibration.text_rows import Note, Row, read_rows
from thanos.errors import DataError
from thanos.events import Event, Watcher
from thanos.model.bos import added_bos, plain_ids, without_bos
from thanos.model.loading import check_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from thanos.calibration.windows import Calibration
    from thanos.model.source import ModelSource

_BLANK_LINES = re.compile(r"\n(?:[ \t\r]*\n)+")
_AT_THE_ENDS = re.compile(r"\A(?:[ \t\r]*\n)+|(?:\n[ \t\r]*)+\Z")


def split_prompts(text: str) -> list[str]:
    """Return the prompts of a plain text, which blank lines separate."""
    parts = (_AT_THE_ENDS.sub("", part).rstrip("\r\n") for part in _BLANK_LINES.split(text))
    return [part for part in parts if part.strip()]


def prompt_texts(source: str, tokenizer: PreTrainedTokenizerBase | None, note: Note) -> list[str]:
    """Return the prompts of local files, at least one.

    Args:
        source: as for a calibration text, see text_files.py. In a ``.txt`` file blank lines separate the prompts. In the other
            files each row is a prompt: a text, or a chat, which the model continues with its next reply. The model's replies at
            the end of a chat are left out.
        tokenizer: its chat template turns chats into text; None if there are no chats.
        note: called with notes for the user, for example on replaced characters.

    Raises:
        DataError: a file is missing or cannot be read, or there is no prompt.
    """
    return texts_of(_rows(source, note), source, tokenizer, note, reply=True)


class Prompted(Protocol):
    """A recipe with prompts."""

    @property
    def prompts(self) -> str | None:
        """The files; None if generated pieces begin with pieces of the text."""
        ...

    @property
    def segment(self) -> int:
        """Tokens of a generated piece."""
        ...


def read_prompt_ids(
    recipe: Prompted,
    tokenizer: PreTrainedTokenizerBase | None,
    width: int,
    emit: Watcher,
    model: PreTrainedModel | None = None,
) -> list[list[int]]:
    """Return the token ids of a recipe's prompts, without the tokens that begin a text; empty if it has none.

    Args:
        recipe: the recipe.
        tokenizer: the model's.
        width: tokens of a sequence, without those that begin a text.
        emit: called with notes for the user.
        model: the model that is to continue them; None if it is not opened yet.

    Raises:
        DataError: as :func:`prompt_texts`; there is no tokenizer; a prompt has no token, or more than half of a piece; or the
            model does not embed one of its tokens.
    """
    if recipe.prompts is None:
        return []
    if tokenizer is None:
        raise DataError("prompts need the model's tokenizer: give tokenizer=AutoTokenizer.from_pretrained(...)")
    found, longest = list[list[int]](), min(recipe.segment, width) // 2

    def note(line: str) -> None:
        emit(Event(kind="note", phase="calibration", message=line))

    for number, text in enumerate(prompt_texts(recipe.prompts, tokenizer, note), 1):
        ids = without_bos(list(plain_ids(tokenizer, text)), added_bos(tokenizer))
        if not 0 < len(ids) <= longest:
            option = "--segment" if recipe.segment < width else "--sequence-length"
            what = (
                f", but half of a generated piece is {longest}; shorten it, or raise {option}" if ids else "; remove it"
            )
            raise DataError(f"prompt {number} of {recipe.prompts} ({text.strip()[:30]!r}) has {len(ids)} tokens{what}")
        found.append(ids)
    if model is not None:
        check_token_ids(torch.tensor([token for ids in found for token in ids]), model)
    return found


def with_prompts(calibration: Calibration, recipe: Prompted) -> Calibration:
    """Return windows with the hash of the files of a recipe's prompts; the same windows if it has none."""
    return calibration if recipe.prompts is None else replace(calibration, prompts_sha256=files_sha256(recipe.prompts))


def check_prompts(recipe: Prompted, sequence_length: int, source: ModelSource | None) -> None:
    """Raise DataError if a recipe's prompts cannot be used. No weight is read.

    Args:
        recipe: the recipe.
        sequence_length: tokens of a sequence.
        source: the model; None checks only the files, not the number of tokens.
    """
    if recipe.prompts is None:
        return
    if source is None:
        for _ in _rows(recipe.prompts, lambda line: None):
            pass
        return
    tokenizer = source.tokenizer()
    read_prompt_ids(recipe, tokenizer, sequence_length - len(added_bos(tokenizer)), lambda event: None)


def _rows(source: str, note: Note) -> Iterator[Row]:
    """Yield the prompts of local files, texts and chats. Raises DataError if there is none."""
    count, unasked = 0, 0
    for path, column in find_files(source, ""):
        plain = path.name.lower().endswith(SUFFIXES[0])
        for row in read_rows(path, column, note):
            for prompt in split_prompts(row) if plain and isinstance(row, str) else [_without_reply(row)]:
                if prompt.strip() if isinstance(prompt, str) else prompt:
                    count += 1
                    yield prompt
                elif isinstance(prompt, list):
                    unasked += 1
    if unasked:
        note(f"{source} has {unasked} {'chat' if unasked == 1 else 'chats'} with replies of the model alone, left out")
    if not count:
        raise DataError(
            f"prompts {source} contain no prompt; write at least one (in a .txt file blank lines separate them)"
        )


def _without_reply(row: Row) -> Row:
    """Return a chat without the model's replies at its end; a text unchanged."""
    if isinstance(row, str):
        return row
    asked = [number for number, message in enumerate(row, 1) if message["role"] != "assistant"]
    return row[: asked[-1]] if asked else []
