"""Rows of text in local files: plain text, JSON lines, JSON and parquet.

If no column is named, the column is ``text``; else ``messages`` or ``conversations`` (chats); else the only column that holds
strings.
"""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeGuard

from thanos.calibration.chats import CHAT_COLUMNS, messages_of
from thanos.errors import DataError
from thanos.system.extras import install_command

DEFAULT_COLUMN = "text"

Row = str | list[dict[str, Any]]
"""A row: its text, or its chat, which is a list of messages with ``role`` and ``content``, at least one."""

Note = Callable[[str], None]
"""A function that is called with each note for the user."""


def read_rows(path: Path, column: str | None, note: Note) -> Iterator[Row]:
    """Yield the rows of a file in order, without rows whose text is null. Half surrogate pairs are unchanged.

    Args:
        path: path of the file.
        column: name of the column to read; None for the default ones, see the module.
        note: called with a note if another column than the default ones is read, and with the number of rows whose text is
            null, if there are any.

    Raises:
        DataError: the file cannot be read or is damaged, or a row has neither a text nor null.
    """
    name, nulls = path.name.lower(), 0
    try:
        if name.endswith(".parquet"):
            rows = _parquet_rows(path, column, note)
        elif name.endswith(".txt"):
            rows = iter([_plain_text(path, column)])
        else:
            rows = _json_rows(path, column, note)
        for row in rows:
            if row is None:
                nulls += 1
            else:
                yield row
    except (OSError, EOFError, zlib.error) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"text file {path} cannot be read: {line}") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"text file {path} is not UTF-8: {error.reason} at byte {error.start}; save it as UTF-8"
        ) from error
    if nulls:
        note(f"{path} has {nulls:,} {'row' if nulls == 1 else 'rows'} whose text is null, left out")


def _plain_text(path: Path, column: str | None) -> str:
    if column is not None:
        raise DataError(f"text file {path} has no columns; leave out :{column}")
    text = path.read_text(encoding="utf-8-sig")
    if "\0" in text:
        raise DataError(f"text file {path} is not text: it holds a NUL character; give a text file in UTF-8")
    return text


# --- JSON -------------------------------------------------------------------------------------------------------------


def _json_rows(path: Path, column: str | None, note: Note) -> Iterator[Row | None]:
    name = path.name.lower()
    zipped = name.endswith(".gz")
    with gzip.open(path, "rt", encoding="utf-8-sig") if zipped else path.open(encoding="utf-8-sig") as file:
        head: list[str] = []
        if name.removesuffix(".gz").endswith(".json"):
            for line in file:
                head.append(line)
                if line.strip():
                    break
            first = "".join(head).lstrip()
            if first.startswith("[") or not _is_json(first):
                yield from _column_of(path, "row", enumerate(_whole(path, first + file.read()), 1), column, note)
                return
        yield from _column_of(path, "line", _parsed_lines(path, itertools.chain(head, file)), column, note)


def _is_json(line: str) -> bool:
    try:
        json.loads(line or "null")
    except (ValueError, RecursionError):
        return False
    return True


def _whole(path: Path, text: str) -> list[Any]:
    """Return the rows of a file that is one JSON value: a list of rows, or one row."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not valid JSON ({_fault(error)}); it holds a list of rows, or one row a line"
        ) from error
    return value if isinstance(value, list) else [value]


def _parsed_lines(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.strip())
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}, line {number}: not valid JSON ({_fault(error, line=False)}); correct the line"
            ) from error


def _fault(error: Exception, *, line: bool = True) -> str:
    """Return what is wrong with JSON and where; ``line``: whether to name the line."""
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    return f"{error.msg} at {f'line {error.lineno}, ' if line else ''}column {error.colno}"


def _column_of(
    path: Path, unit: str, rows: Iterable[tuple[int, Any]], column: str | None, note: Note
) -> Iterator[Row | None]:
    """Yield the column's value of each numbered row. If no column is named, the first row with a text decides it."""
    for number, row in rows:
        if column is None and isinstance(row, dict) and not _is_null(row):
            kinds = {name: kind for name, value in row.items() if (kind := _kind(name, value))}
            column = _choose(path, kinds, note)
        wanted = column or DEFAULT_COLUMN
        if isinstance(row, dict) and (_is_null(row) if column is None else row.get(column, "") is None):
            yield None
            continue
        value = row.get(wanted) if isinstance(row, dict) else None
        if not _is_row(value, wanted):
            raise DataError(f"{path}, {unit} {number}: no string under {wanted!r}; {_complaint(row, wanted)}")
        yield _row(value, f"{path}, {unit} {number}")


def _is_row(value: Any, column: str) -> TypeGuard[str | list[Any]]:
    return isinstance(value, str) or (isinstance(value, list) and column != DEFAULT_COLUMN)


def _row(value: str | list[Any], place: str) -> Row:
    """Return a row; a chat without messages is an empty text."""
    return value if isinstance(value, str) else messages_of(value, place) or ""


def _is_null(row: dict[str, Any]) -> bool:
    """Return whether a row has null instead of a text. Such a row does not determine the column."""
    for usual in (DEFAULT_COLUMN, *CHAT_COLUMNS):
        if usual in row:
            return row[usual] is None
    return None in row.values() and not any(_kind(*item) for item in row.items())


def _kind(name: str, value: Any) -> str | None:
    if isinstance(value, str):
        return "string"
    return "chat" if isinstance(value, list) and name in CHAT_COLUMNS else None


def _complaint(row: Any, column: str) -> str:
    if not isinstance(row, dict):
        return f'it is {_name_of(row)}, not an object such as {{"text": "…"}}'
    if column not in row:
        return f"there are {', '.join(map(repr, row)) or 'no columns'}; name one with FILE:COLUMN"
    return f"it is {_name_of(row[column])}; remove such rows, or name another column with FILE:COLUMN"


def _name_of(value: Any) -> str:
    """Return JSON's name for a kind of value."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _choose(path: Path, kinds: dict[str, str], note: Note) -> str | None:
    """Return the column to read if none is named; None if the columns do not determine it."""
    if kinds.get(DEFAULT_COLUMN):
        return DEFAULT_COLUMN
    for name in CHAT_COLUMNS:
        if kinds.get(name) == "chat":
            return name
    strings = [name for name, kind in kinds.items() if kind == "string"]
    if len(strings) != 1:
        return None
    note(f"{path} has no column {DEFAULT_COLUMN!r}; {strings[0]!r} is read, the only one that holds strings")
    return strings[0]


# --- parquet ----------------------------------------------------------------------------------------------------------


def _parquet_rows(path: Path, column: str | None, note: Note) -> Iterator[Row | None]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(f"parquet files need the package pyarrow: {install_command('data')}") from error
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            kinds = {each.name: kind for each in schema if (kind := _arrow_kind(each.name, each.type))}
            wanted = column or _choose(path, kinds, note) or DEFAULT_COLUMN
            if wanted not in schema.names:
                named = ", ".join(schema.names)
                raise DataError(f"{path} has no column {wanted!r}; there are {named}; name one with FILE:COLUMN")
            values = (each for batch in file.iter_batches(columns=[wanted]) for each in batch.column(0).to_pylist())
            for number, value in enumerate(values, 1):
                if value is not None and not _is_row(value, wanted):
                    raise DataError(f"{path}: the column {wanted!r} holds something other than strings")
                yield None if value is None else _row(value, f"{path}, row {number}")
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a valid parquet file: {str(error).splitlines()[0]}") from error


def _arrow_kind(name: str, kind: Any) -> str | None:
    from pyarrow import types

    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "string"
    is_list = types.is_list(kind) or types.is_large_list(kind)
    return "chat" if is_list and name in CHAT_COLUMNS else None
