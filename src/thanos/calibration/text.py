"""Sources of text: named data sets, local files, and the standard library's own documentation.

Calibration and evaluation never use the same text of a named source: ``wikitext2`` and ``c4`` have different splits, ``pydoc``
has disjoint topics. A local file (text_files.py) is used whole, for either purpose.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from thanos.calibration.text_files import SUFFIXES, find_files
from thanos.calibration.text_rows import Note, Row, read_rows
from thanos.errors import DataError
from thanos.model.bos import bos_text
from thanos.model.fingerprint import file_sha256
from thanos.model.transformers_errors import first_line
from thanos.system.extras import install_command, is_installed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMED = ("wikitext2", "c4", "pydoc", "self")

_FROM_HUB: dict[str, tuple[str, dict[str, Any], tuple[str, str]]] = {
    "wikitext2": ("Salesforce/wikitext", {"name": "wikitext-2-raw-v1"}, ("train", "test")),
    "c4": ("allenai/c4", {}, ("train", "validation")),
}
"""Source → repository on the hub, arguments of ``load_dataset``, and the splits of calibration and evaluation."""

_C4_FILES = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}

_CALIBRATION = ", ".join(NAMED)
_EVALUATION = ", ".join(name for name in NAMED if name != "self")

_HALF_PAIR = re.compile("[\ud800-\udfff]")
"""One half of a surrogate pair. JSON can escape it, but no encoding can write it."""

_PYDOC_EVALUATION_EVERY = 3
"""Every third distinct topic is for evaluation."""

_C4_EVALUATION_ROWS = 1100
"""C4 is commonly evaluated on the first 1100 validation documents, joined by spaces (data loaders of SparseGPT and Wanda)."""


def check_text_exists(source: str, *, evaluation: bool = False) -> None:
    """Raise DataError for a source that is unknown or missing, or that needs a package that is missing.

    The check reads no row and does not query the hub. ``source`` is as for :func:`calibration_documents`.
    """
    if evaluation and source == "self":
        raise DataError(
            "text 'self' is for calibration only: a model's own text cannot measure its quality; choose another source"
        )
    if source in _FROM_HUB and not is_installed("datasets"):
        raise DataError(f"{source} needs the package datasets: {install_command('data')}")
    if source not in NAMED:
        find_files(source, _EVALUATION if evaluation else _CALIBRATION)


def check_text_source(
    source: str, *, evaluation: bool = False, tokenizer: Callable[[], PreTrainedTokenizerBase] | None = None
) -> None:
    """Raise DataError for a source that cannot be used: its first rows cannot be read, or it holds no text.

    The check reads the rows up to the first with text, and does not query the hub. ``source`` is as for
    :func:`calibration_documents`. If that row is a chat, ``tokenizer`` returns the tokenizer whose chat template must render
    it; None skips this check.
    """
    check_text_exists(source, evaluation=evaluation)
    if source in NAMED:
        return
    for row in _raw_rows(source, allowed=_EVALUATION if evaluation else _CALIBRATION, note=_ignore_note):
        if not isinstance(row, str):
            if tokenizer is not None:
                _rendered(row, source, tokenizer())
            return
        if row.strip():
            return
    raise DataError(f"{source} holds no text (rows that are empty or null do not count)")


def calibration_documents(
    source: str, tokenizer: PreTrainedTokenizerBase | None = None, on_note: Note | None = None
) -> list[str]:
    """Return the documents of a source, without the rows that hold no text.

    Args:
        source: ``wikitext2``, ``c4``, ``pydoc`` or local files (text_files.py). ``wikitext2`` and a ``.txt`` file are one
            document each; in the other sources each row is a document.
        tokenizer: its chat template turns chats into text; None if the source has no chats.
        on_note: called with each note for the user, for example on replaced characters.

    Raises:
        DataError: the source is unknown, missing, unreadable or empty.
    """
    if source == "wikitext2":
        # A row is a paragraph or a heading: join them into one text, as SparseGPT's data loader does.
        rows = ["\n\n".join(_hub_rows(source))]
    elif source == "c4":
        rows = _hub_rows(source)
    elif source == "pydoc":
        rows = [text for index, text in enumerate(_topics()) if index % _PYDOC_EVALUATION_EVERY]
    else:
        rows = _file_rows(source, _CALIBRATION, tokenizer, on_note or _ignore_note)
    documents = [row for row in rows if row.strip()]
    if not documents:
        raise DataError(f"{source} holds no text (rows that are empty or null do not count)")
    return documents


def evaluation_rows(
    source: str, tokenizer: PreTrainedTokenizerBase | None = None, on_note: Note | None = None
) -> list[str]:
    """Return the rows of a source in order, empty rows included; evaluation joins them with a blank line.

    The arguments and the DataError are those of :func:`calibration_documents`.
    """
    if source == "self":
        check_text_source(source, evaluation=True)
    if source == "wikitext2":
        rows = _hub_rows(source, evaluation=True)
    elif source == "c4":
        # One row, joined by spaces: perplexities are then comparable with those of the common data loaders.
        rows = [" ".join(_hub_rows(source, evaluation=True)[:_C4_EVALUATION_ROWS])]
    elif source == "pydoc":
        rows = _topics()[::_PYDOC_EVALUATION_EVERY]
    else:
        rows = _file_rows(source, _EVALUATION, tokenizer, on_note or _ignore_note)
    if not any(row.strip() for row in rows):
        raise DataError(f"{source} holds no text (rows that are empty or null do not count)")
    return rows


def _topics() -> list[str]:
    """Return the distinct texts of the standard library's help topics, in the order of each text's first name."""
    from pydoc_data.topics import topics

    return list(dict.fromkeys(text for _, text in sorted(topics.items())))


def fetch_text(source: str, *, evaluation: bool = False) -> None:
    """Download a named data set of the hub, unless it is in the cache of ``datasets``; other sources need no download.

    Raises DataError if that fails. A caller that reads the text only after a long step calls this before it.
    """
    if source in _FROM_HUB:
        _hub_dataset(source, evaluation=evaluation)


def _hub_rows(source: str, *, evaluation: bool = False) -> list[str]:
    return list(_hub_dataset(source, evaluation=evaluation)["text"])


def _hub_dataset(source: str, *, evaluation: bool) -> Any:
    repository, arguments, splits = _FROM_HUB[source]
    split = splits[evaluation]
    if source == "c4":
        arguments = {**arguments, "data_files": {split: _C4_FILES[split]}}
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(f"{source} needs the package datasets: {install_command('data')}") from error
    try:
        return load_dataset(repository, **arguments, split=split)
    except Exception as error:  # datasets raises its own, the hub's and the network's errors
        raise DataError(
            f"{source} cannot be downloaded from the hub ({first_line(error)}); without a network give pydoc, or a local file: "
            "--calibration FILE or --text FILE, one of " + ", ".join(SUFFIXES)
        ) from error


def _ignore_note(note: str) -> None:
    pass


def _raw_rows(source: str, *, allowed: str, note: Note) -> Iterator[Row]:
    for path, column in find_files(source, allowed):
        yield from read_rows(path, column, note)


def _file_rows(source: str, allowed: str, tokenizer: PreTrainedTokenizerBase | None, note: Note) -> list[str]:
    return texts_of(_raw_rows(source, allowed=allowed, note=note), source, tokenizer, note)


def texts_of(
    rows: Iterable[Row], source: str, tokenizer: PreTrainedTokenizerBase | None, note: Note, *, reply: bool = False
) -> list[str]:
    """Return the texts of a source's rows.

    Args:
        rows: the rows.
        source: name of the source, for messages.
        tokenizer: its chat template turns chats into text; None if there are none.
        note: called with a note if characters are replaced.
        reply: end a chat with the words after which the model's reply begins.

    Raises:
        DataError: a chat cannot be turned into text.
    """
    texts, halves = [], 0
    for row in rows:
        found = row if isinstance(row, str) else _rendered(row, source, tokenizer, reply=reply)
        text, replaced = _HALF_PAIR.subn("\ufffd", found)
        texts.append(text)
        halves += replaced
    if halves:
        what = "1 half of a surrogate pair" if halves == 1 else f"{halves:,} halves of surrogate pairs"
        note(f"{source} holds {what}; a half is not a character, so U+FFFD replaces it")
    return texts


def _rendered(
    messages: list[dict[str, Any]], source: str, tokenizer: PreTrainedTokenizerBase | None, *, reply: bool = False
) -> str:
    """Return a chat as text. Remove a BOS that the template writes, if the tokenizer adds BOS to every text anyway."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{source} holds chats (lists of messages), but the tokenizer has no chat template; give rows with plain text, "
            "or a model that was trained on chats"
        )
    assert tokenizer is not None
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply))
    except Exception as error:  # Jinja's own errors, and those that a template raises
        raise DataError(
            f"{source} holds a chat that the tokenizer's chat template refuses ({first_line(error)}); a message has role and "
            "content"
        ) from error
    if not text.strip():
        raise DataError(
            f"{source} holds a chat for which the tokenizer's chat template writes nothing; check its roles"
        )
    return text.removeprefix(bos_text(tokenizer))


def text_sha256(source: str) -> str | None:
    """Return a hash of the files of a text source, see :func:`calibration_documents`.

    None for a named data set, or if there are no such files.

    For a single file this is the hash of its content.
    """
    return None if source in NAMED else files_sha256(source)  # also if a local folder has the name of a data set


def files_sha256(source: str) -> str | None:
    """Return a hash of the local files of a source, as :func:`text_sha256` does; None if there are none."""
    try:
        files = [path for path, _ in find_files(source, "")]
    except DataError:
        return None
    if len(files) == 1:
        return file_sha256(files[0])
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {file_sha256(path)}\n".encode())
    return digest.hexdigest()
