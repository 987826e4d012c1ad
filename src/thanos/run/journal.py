"""What a run has finished, on the disk: one line for each decoder block, added when the block's tensors are safe there.

Pure file input and output. The format is described in docs/formats.md.
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
    """A file of checked lines, each one a :class:`BlockRecord`, that only ever grows.

    Args:
        path: the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[BlockRecord]:
        """Return the records whose checksums hold, in the order of the file. Changes nothing."""
        if not self.path.exists():
            return []
        return list(_parse(self.path.read_bytes()))

    def append(self, record: BlockRecord) -> None:
        """Add a record and force it to the disk; a torn line that a crash left at the end goes."""
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
    """Return the records that hold, by block.

    A block that was done again has two records: the later one holds. If its tensors came out otherwise, the records of
    later blocks written before it hold no longer, since those blocks were fed by the old ones.
    """
    held: dict[int | None, BlockRecord] = {}
    for record in records:
        old = held.get(record.block)
        if old is not None and old.tensors != record.tensors:
            held = {block: other for block, other in held.items() if not comes_after(block, record.block)}
        held[record.block] = record
    return held


def comes_after(block: int | None, other: int | None) -> bool:
    """Tell whether ``block`` is fed by ``other``; None is what follows all the blocks."""
    return other is not None and (block is None or block > other)


def _parse(data: bytes) -> Iterator[BlockRecord]:
    for line in data.split(b"\n")[:-1]:  # what follows the last line's end was torn
        try:
            values = json.loads(line)
            if values.pop("checksum") == _checksum(values):
                yield BlockRecord.from_dict(values)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # not as it was written: the block counts as unfinished


def _checksum(values: dict[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
