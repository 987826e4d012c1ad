"""The journal of a run: a file with one line for each finished decoder block, appended once its tensors are on the disk.

This module only reads and writes the file. docs/formats.md describes the format.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from thanos.engine.records import BlockRecord
from thanos.system.files import trim


class Journal:
    """An append-only file of lines with checksums; each line is a :class:`BlockRecord`.

    Args:
        path: the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[BlockRecord]:
        """Return the records with a correct checksum, in the order of the file. The file does not change."""
        if not self.path.exists():
            return []
        return list(_parse(self.path.read_bytes()))

    def append(self, record: BlockRecord) -> None:
        """Append a record and force it to the disk. Remove an incomplete last line, which a crash may have left."""
        values = record.to_dict()
        line = json.dumps({"checksum": _checksum(values), **values}, ensure_ascii=False).encode() + b"\n"
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            end = trim(descriptor)
            while line:
                count = os.pwrite(descriptor, line, end)
                line, end = line[count:], end + count
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def current(records: Iterable[BlockRecord]) -> dict[int | None, BlockRecord]:
    """Return the latest valid record of each block.

    A block that was solved again has two records, and the later one is valid. If its tensors differ from those of the first,
    the records of later blocks written before it are invalid: these blocks had the old outputs as inputs.
    """
    held: dict[int | None, BlockRecord] = {}
    for record in records:
        old = held.get(record.block)
        if old is not None and old.tensors != record.tensors:
            held = {block: other for block, other in held.items() if not comes_after(block, record.block)}
        held[record.block] = record
    return held


def comes_after(block: int | None, other: int | None) -> bool:
    """Return whether the inputs of ``block`` depend on ``other``. None stands for the layers after the blocks."""
    return other is not None and (block is None or block > other)


def _parse(data: bytes) -> Iterator[BlockRecord]:
    for line in data.split(b"\n")[:-1]:  # bytes after the last line feed are an incomplete line
        try:
            values = json.loads(line)
            if values.pop("checksum") == _checksum(values):
                yield BlockRecord.from_dict(values)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # a damaged line: the block counts as unfinished


def _checksum(values: dict[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
