"""Sources of text: named data sets, local files, and the standard library's own documentation.

Calibration and evaluation never share text: ``wikitext2`` and ``c4`` use different splits, ``pydoc`` disjoint topics. A
local file is used whole for whichever it is given.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from thanos.errors import DataError

NAMED = ("wikitext2", "c4", "pydoc", "self")
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")

_PYDOC_EVALUATION_EVERY = 3
"""Every third distinct topic is for evaluation."""

_C4_EVALUATION_ROWS = 1100
"""The field evaluates C4 on the first 1100 validation documents, joined by spaces (SparseGPT's and Wanda's data loaders)."""


def calibration_documents(source: str) -> list[str]:
    """Return the documents of a source, empty ones left out.

    Args:
        source: ``wikitext2``, ``c4``, ``pydoc`` or a local file. ``wikitext2`` and a ``.txt`` file are one document each; in
            the others a row is one.

    Raises:
        DataError: the source is unknown, missing, unreadable or empty.
    """
    if source == "wikitext2":
        # A row is a paragraph or a heading: the field joins them to one text (SparseGPT's data loader).
        rows = ["\n\n".join(_hub_rows(source, "Salesforce/wikitext", name="wikitext-2-raw-v1", split="train"))]
    elif source == "c4":
        files = {"train": "en/c4-train.00000-of-01024.json.gz"}
        rows = _hub_rows(source, "allenai/c4", data_files=files, split="train")
    elif source == "pydoc":
        rows = [text for index, text in enumerate(_topics()) if index % _PYDOC_EVALUATION_EVERY]
    else:
        rows = _file_rows(source, allowed="wikitext2, c4, pydoc, self")
    return _not_empty(source, [row for row in rows if row.strip()])


def evaluation_rows(source: str) -> list[str]:
    """Return the rows of a source, in order and with empty ones; evaluation joins them with a blank line.

    Args:
        source: as for :func:`calibration_documents`.

    Raises:
        DataError: the source is unknown, missing, unreadable or empty.
    """
    if source == "self":
        raise DataError("text 'self' is for calibration: a model's own text does not measure it; choose another source")
    if source == "wikitext2":
        rows = _hub_rows(source, "Salesforce/wikitext", name="wikitext-2-raw-v1", split="test")
    elif source == "c4":
        files = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
        # One row, joined by spaces, so that perplexities compare with those of the field's data loaders.
        rows = [" ".join(_hub_rows(source, "allenai/c4", data_files=files, split="validation")[:_C4_EVALUATION_ROWS])]
    elif source == "pydoc":
        rows = _topics()[::_PYDOC_EVALUATION_EVERY]
    else:
        rows = _file_rows(source, allowed="wikitext2, c4, pydoc")
    if not any(row.strip() for row in rows):
        raise DataError(f"{source} holds no text")
    return rows


def _topics() -> list[str]:
    """Return the distinct texts of the standard library's help topics, ordered by their first name."""
    from pydoc_data.topics import topics

    return list(dict.fromkeys(text for _, text in sorted(topics.items())))


def _hub_rows(source: str, repository: str, **arguments: Any) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(f"{source} needs the package datasets: pip install 'thanos-llm[data]'") from error
    try:
        return list(load_dataset(repository, **arguments)["text"])
    except Exception as error:  # datasets raises its own, the hub's and the network's errors
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{source} cannot be had from the hub ({line}); without a network give a local file instead: "
            "--calibration FILE or --text FILE, one of " + ", ".join(SUFFIXES)
        ) from error


def _file_rows(source: str, *, allowed: str) -> list[str]:
    path = Path(source)
    if not path.name.endswith(SUFFIXES):
        raise DataError(
            f"text source {source!r} is unknown; choose {allowed}, or a file ending in {', '.join(SUFFIXES)}"
        )
    if not path.is_file():
        raise DataError(f"text file {source} does not exist")
    try:
        if source.endswith(".parquet"):
            return _parquet_rows(path)
        if source.endswith(".txt"):
            return [path.read_text(encoding="utf-8")]
        return list(_json_rows(path))
    except (OSError, EOFError, zlib.error) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"text file {source} cannot be read: {line}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"text file {source} is not UTF-8: {error.reason} at byte {error.start}") from error


def _json_rows(path: Path) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: not valid JSON ({error})") from error
            text = row.get("text") if isinstance(row, dict) else None
            if not isinstance(text, str):
                there = f"there are {', '.join(map(repr, row))}" if isinstance(row, dict) else "it is no object"
                raise DataError(f"{path}, line {number}: no string under 'text'; {there}")
            yield text


def _parquet_rows(path: Path) -> list[str]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError("parquet files need the package pyarrow: pip install 'thanos-llm[data]'") from error
    try:
        names = parquet.read_schema(path).names
        if "text" not in names:
            raise DataError(f"{path} has no column 'text'; there are {', '.join(names)}")
        rows = parquet.read_table(path, columns=["text"])["text"].to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a valid parquet file: {str(error).splitlines()[0]}") from error
    if not all(isinstance(row, str) for row in rows):
        raise DataError(f"{path}: the column 'text' holds something other than strings")
    return rows


def _not_empty(source: str, documents: list[str]) -> list[str]:
    if not documents:
        raise DataError(f"{source} holds no text")
    return documents
