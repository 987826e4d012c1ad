"""Prompts in local files: the dense model continues them to generate text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from thanos.calibration.text import texts_of
from thanos.calibration.text_files import SUFFIXES, find_files
from thanos.calibration.text_rows import Note, Row, read_rows
from thanos.errors import DataError
from thanos.events import Event, Watcher
from thanos.model.bos import added_bos, plain_ids, without_bos
from thanos.model.loading import check_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from thanos.model.source import ModelSource

_BLANK_LINES = re.compile(r"\n(?:[ \t\r]*\n)+")


def split_prompts(text: str) -> list[str]:
    """Return the prompts of a plain text, which blank lines separate."""
    return [part.strip("\r\n") for part in _BLANK_LINES.split(text) if part.strip()]


def read_prompts(source: str, tokenizer: PreTrainedTokenizerBase | None, note: Note) -> list[str]:
    """Return the prompts of local files, at least one.

    Args:
        source: as for a calibration text, see text_files.py. In a ``.txt`` file blank lines separate the prompts. In the other
            files each row is a prompt: a text, or a chat, which the model continues with its next reply.
        tokenizer: its chat template turns chats into text; None if there are no chats.
        note: called with notes for the user, for example on replaced characters.

    Raises:
        DataError: a file is missing or cannot be read, or there is no prompt.
    """
    texts = texts_of(_rows(source, note), source, tokenizer, note, reply=True)
    prompts = [text for text in texts if text.strip()]
    if not prompts:
        raise DataError(
            f"prompts {source} contain no prompt; write at least one, separated by blank lines in a .txt file"
        )
    return prompts


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
    recipe: Prompted, tokenizer: PreTrainedTokenizerBase | None, width: int, emit: Watcher
) -> list[list[int]]:
    """Return the token ids of a recipe's prompts, without the tokens that begin a text; empty if it has none.

    Args:
        recipe: the recipe.
        tokenizer: the model's.
        width: tokens of a sequence, without those that begin a text.
        emit: called with notes for the user.

    Raises:
        DataError: as :func:`read_prompts`; there is no tokenizer; or a prompt has no token, or more than half of a piece.
    """
    if recipe.prompts is None:
        return []
    if tokenizer is None:
        raise DataError("prompts need the model's tokenizer: give tokenizer=AutoTokenizer.from_pretrained(...)")
    found, longest = list[list[int]](), min(recipe.segment, width) // 2

    def note(line: str) -> None:
        emit(Event(kind="note", phase="calibration", message=line))

    for number, text in enumerate(read_prompts(recipe.prompts, tokenizer, note), 1):
        ids = without_bos(list(plain_ids(tokenizer, text)), added_bos(tokenizer))
        if not 0 < len(ids) <= longest:
            limit = f", but half of a generated piece is {longest}; shorten it, or raise --segment" if ids else ""
            raise DataError(f"prompt {number} of {recipe.prompts} ({text.strip()[:30]!r}) has {len(ids)} tokens{limit}")
        found.append(ids)
    return found


def check_prompt_ids(prompts: Sequence[Sequence[int]], model: PreTrainedModel) -> None:
    """Raise DataError if the model does not embed a token of the prompts."""
    if prompts:
        check_token_ids(torch.tensor([[token for prompt in prompts for token in prompt]]), model)


def check_prompts(recipe: Prompted, sequence_length: int, source: ModelSource | None) -> None:
    """Raise DataError if a recipe's prompts cannot be used. No weight is read.

    Args:
        recipe: the recipe.
        sequence_length: tokens of a sequence.
        source: the model; None checks only whether the files exist.
    """
    if recipe.prompts is None:
        return
    if source is None:
        find_files(recipe.prompts, "")
        return
    tokenizer = source.tokenizer()
    read_prompt_ids(recipe, tokenizer, sequence_length - len(added_bos(tokenizer)), lambda event: None)


def _rows(source: str, note: Note) -> Iterator[Row]:
    for path, column in find_files(source, ""):
        for row in read_rows(path, column, note):
            plain = isinstance(row, str) and path.name.lower().endswith(SUFFIXES[0])
            yield from split_prompts(str(row)) if plain else [row]
