"""What a run has finished, on the disk: one line for each decoder block, added when the block's tensors are safe there.

Pure file input and output. The format is described in docs/formats.md.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thanos.report import LayerRecord, PhaseRecord

_CHUNK = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockRecord:
    """One finished decoder block.

    Attributes:
        block: its index; None for what follows the blocks, such as lm_head.
        layers: the report's records of its layers.
        tensors: name in the checkpoint → checksum of the bytes that were written.
        batch: sequences per forward pass, on which the last bits of results depend; None where there was no pass.
        starts: (first sequence, batch size) of the pass that gave the block's outputs; see :class:`~thanos.passes.Passes`.
        place: where the activations were kept.
        notes: the run's warnings that arose in this block.
        phases: seconds and memory of the whole run so far.
    """

    block: int | None
    layers: list[LayerRecord]
    tensors: dict[str, str]
    batch: int | None = None
    starts: list[tuple[int, int]] = field(default_factory=list)
    place: str = ""
    notes: list[str] = field(default_factory=list)
    phases: dict[str, PhaseRecord] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BlockRecord:
        """Build a record from what :meth:`to_dict` gave and JSON carried."""
        values = dict(values)
        values["layers"] = [LayerRecord(**{**layer, "shape": tuple(layer["shape"])}) for layer in values["layers"]]
        values["starts"] = [(first, size) for first, size in values["starts"]]
        values["phases"] = {name: PhaseRecord(**phase) for name, phase in values["phases"].items()}
        return cls(**values)


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


def trim(descriptor: int) -> int:
    """Cut an open file of lines after its last whole line; return where that ends."""
    size = start = os.fstat(descriptor).st_size
    end = 0
    while start and not end:
        last, start = start, max(0, start - _CHUNK)
        end = start + 1 + os.pread(descriptor, last - start, start).rfind(b"\n")
        end = end if end > start else 0
    if end < size:
        os.ftruncate(descriptor, end)
    return end


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
