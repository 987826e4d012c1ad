"""``store.jsonl``: one record per cell of a study, appended and never changed. The format is described in docs/formats.md.

A cell may have several records, since a cell that failed is tried again on the next run: the last one counts.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal

from thanos.errors import DataError, ResourceError
from thanos.system.documents import Document
from thanos.system.files import write_atomically

SCHEMA = 1
"""Raised when a reader of the old format would misread the new one."""

STORE_NAME = "store.jsonl"

PACKED_NAME = "store.jsonl.gz"
"""The same, compressed to a tenth by gzip: a store that is kept. It is read where there is no other, and unpacked to go on."""

_FORMER_METHODS = ("formula",)  # of cells that older versions measured: their records stay in the file and are skipped

_OBJECTS = ("versions", "machine", "cell", "asked", "sources", "phases")
_OBJECTS_OR_NULL = ("recipe", "calibration", "effective_sparsity", "evaluation", "zero_shot")
_TYPES: dict[str, tuple[str, type | UnionType]] = {
    **dict.fromkeys(("key", "status", "date"), ("a string", str)),
    **dict.fromkeys(_OBJECTS, ("an object", dict)),
    **dict.fromkeys(_OBJECTS_OR_NULL, ("an object or null", dict | None)),
    "layers": ("a list", list),
}
"""Fields of a record whose types its readers rely on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CellRecord(Document):
    """One cell of a study: what was asked for and what came out; the attributes are the keys of a line.

    A failed record keeps the results that were whole before it failed; they are for a person to look at, and no cell's result.

    Attributes:
        key: hash of ``cell`` and ``asked``, see :func:`cell_key`.
        status: ``done`` or ``failed``.
        reason: why it failed, one line; None for ``done``.
        date: when it ended, ISO 8601 in UTC.
        commit: of the source tree that ran, with ``+changes`` after it where the tree was not clean; None where unknown.
        thanos_version: of the package.
        versions: of Python and the packages that shape the numbers.
        machine: ``device``, ``platform``, ``cores``, ``memory_bytes``, and ``sharers``, the workers that shared the device.
        cell: the coordinates in the grid: ``model``, ``method`` (``dense`` for the model as it is), ``pattern``,
            ``sparsity``, ``outlier_rows``, ``keep_budget``, ``block_size``, ``damping``, ``calibration``, ``samples``,
            ``sequence_length``, ``seed``. All but the model and the method are None for the dense model.
        asked: what else shaped the numbers: ``dtype``, ``evaluation`` (``text``, ``sequence_length``, ``max_windows``,
            ``compare``: with the dense model) and ``zero_shot`` (``tasks``, ``limit``; None where none was asked for). Both
            are None for a model of which the cost alone is measured. ``bos`` (``auto``, ``window`` or ``text``) is there where
            the tokenizer begins texts with a beginning-of-text token: calibration windows begin with it, and evaluation puts it
            where that says.
        sources: sha256 of ``model``, ``calibration``, ``text`` and ``tasks`` as files; None where there is no file.
        recipe: the whole recipe, as in pruning.json; None for the dense model.
        calibration: the windows' fingerprint, as in pruning.json; None for the dense model.
        effective_sparsity: measured shares of zeros, ``targeted`` (pruned layers) and ``all`` (parameters).
        evaluation: ``text``, ``text_sha256``, ``sequence_length``, ``bos`` (``window``, ``text``, ``none``), ``windows``,
            ``tokens``, ``perplexity``, ``mean_loss``, ``kl_divergence``, ``top1_agreement``.
        zero_shot: ``tasks`` (name → ``acc``, ``acc_stderr``, ``acc_norm``, ``acc_norm_stderr``, ``samples``) and
            ``average`` (the same but ``samples``); None where none was asked for.
        layers: the layers, as in pruning.json.
        phases: seconds and peaks of memory by phase: those of pruning.json, then ``reference`` (loading the dense model and
            the text, where the worker had not yet), ``evaluate`` (loading the model too, unless it is the dense one of
            ``reference``) and ``zero_shot`` (with that model).
        seconds: of pruning, without evaluation.
        host_peak_bytes: while pruning.
        device_peak_bytes: while pruning; None without a CUDA device.
        schema: version of this format.
    """

    key: str
    status: Literal["done", "failed"]
    reason: str | None
    date: str
    commit: str | None
    thanos_version: str
    versions: dict[str, str]
    machine: dict[str, Any]
    cell: dict[str, Any]
    asked: dict[str, Any]
    sources: dict[str, str | None]
    recipe: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
    effective_sparsity: dict[str, float] | None = None
    evaluation: dict[str, Any] | None = None
    zero_shot: dict[str, Any] | None = None
    layers: list[dict[str, Any]] = field(default_factory=list)
    phases: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float | None = None
    host_peak_bytes: int | None = None
    device_peak_bytes: int | None = None
    schema: int = SCHEMA


@dataclass(frozen=True, slots=True)
class Contents:
    """What a store holds.

    Attributes:
        records: the last record of each cell, in the order in which the cells were first recorded.
        warnings: what a person should know, such as a torn last line, or cells that lie in another file.
    """

    records: list[CellRecord]
    warnings: list[str]

    @property
    def done(self) -> list[CellRecord]:
        """The cells that have results."""
        return [record for record in self.records if record.status == "done"]

    @property
    def failed(self) -> list[CellRecord]:
        """The cells that failed."""
        return [record for record in self.records if record.status == "failed"]


def cell_key(cell: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Return the sha256 of a cell and of what was asked about it, whatever the order of their names."""
    text = json.dumps({"cell": cell, "asked": asked}, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_store(folder: str | Path) -> Contents:
    """Read the store of a study folder. Changes nothing, and may be called while a study runs.

    Args:
        folder: the study's folder, or the ``store.jsonl`` in it, which is then read alone.

    Raises:
        DataError: there is no store, a newer version wrote it, or a line other than the last is damaged.
    """
    path = store_path(folder)
    records, warnings = _records(path)
    packed = path.with_name(PACKED_NAME)
    if path not in (Path(folder), packed) and packed.exists():
        warnings += _left_out(path, records, packed)
    return Contents(list(records.values()), warnings)


class StoreWriter:
    """Appends records to the store of a study folder; one writer at a time, which the study's lock sees to.

    Args:
        folder: the study's folder, which exists. A torn last line is cut off, and blank lines at the end.

    Raises:
        ResourceError: the file cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / STORE_NAME
        try:
            if store_path(folder).name == PACKED_NAME:
                write_atomically(self._path, _read(store_path(folder)), durable=True)
            data = self._path.read_bytes() if self._path.exists() else b""
            lines, _ = _split(data)
            end = sum(len(line) + 1 for line in lines)
            if end < len(data):
                os.truncate(self._path, end)
            elif end > len(data):
                self._append(b"\n")
        except OSError as error:
            raise _cannot_write(self._path, error) from error

    def append(self, record: CellRecord) -> None:
        """Add one record and force it to the disk.

        Raises:
            ResourceError: the file cannot be written.
        """
        text = json.dumps(record.to_dict(), ensure_ascii=False, allow_nan=False)
        try:
            self._append(text.encode() + b"\n")
        except OSError as error:
            raise _cannot_write(self._path, error) from error

    def _append(self, data: bytes) -> None:
        with self._path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def store_path(folder: str | Path) -> Path:
    """Return the path of the store in a study's folder; a path that is the store itself is kept.

    The packed store counts where the other does not exist or is empty.
    """
    path = Path(folder)
    if path.name in (STORE_NAME, PACKED_NAME):
        return path
    plain, packed = path / STORE_NAME, path / PACKED_NAME
    return packed if packed.exists() and not (plain.exists() and plain.stat().st_size) else plain


def _records(path: Path) -> tuple[dict[str, CellRecord], list[str]]:
    """Return the last record of each cell by its key, and warnings."""
    data = _read(path)
    lines, torn = _split(data)
    records: dict[str, CellRecord] = {}
    for number, line in enumerate(lines, 1):
        record = _parse(path, number, line)
        if record.cell.get("method") not in _FORMER_METHODS:
            records[record.key] = record
    for record in list(records.values()):
        if "bos" in record.asked:  # what an older version measured of the cell, without that token, is superseded
            records.pop(
                cell_key(record.cell, {name: each for name, each in record.asked.items() if name != "bos"}), None
            )
    if not torn:
        return records, []
    number = data.count(b"\n") + 1
    warning = (
        f"{path}, line {number}: the last record is torn ({len(torn)} bytes) and was left out; its cell will run again"
    )
    return records, [warning]


def _left_out(path: Path, records: Mapping[str, CellRecord], packed: Path) -> list[str]:
    """Return a warning if the packed store beside the one that was read holds cells that the latter lacks."""
    try:
        lacking = len(_records(packed)[0].keys() - records.keys())
    except DataError as error:
        return [
            f"{path} alone was read, since {packed} beside it is refused ({error}); keep one of the two in the folder"
        ]
    if not lacking:
        return []
    return [
        f"{packed} holds {lacking} {'cell' if lacking == 1 else 'cells'} that {path} lacks; the latter alone was read: remove "
        f"{path.name} to go on with {packed.name}, or {packed.name} if it is of no more use"
    ]


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.name == PACKED_NAME else data
    except (OSError, EOFError, zlib.error) as error:
        said = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read ({said}); a study's folder holds {STORE_NAME}") from error


def _split(data: bytes) -> tuple[list[bytes], bytes]:
    """Return the complete lines, and the torn one at the end; a whole record that lacks only its line end is complete.

    White space at the end, which editors add, belongs to neither.
    """
    *lines, last = data.split(b"\n")
    if last.strip():
        try:
            whole = isinstance(json.loads(last), dict)
        except (ValueError, RecursionError):
            whole = False
        if whole:
            return [*lines, last], b""
    while lines and not lines[-1].strip():
        lines.pop()
    return lines, last if last.strip() else b""


def _parse(path: Path, number: int, line: bytes) -> CellRecord:
    try:
        values = json.loads(line)
        schema = values["schema"]
        if type(schema) is not int:  # nor a bool
            raise TypeError("schema must be a whole number")
        if schema > SCHEMA:
            raise DataError(
                f"{path}, line {number}: a newer version of thanos wrote this record (schema {schema}; this version reads "
                f"up to {SCHEMA}); upgrade thanos, or choose another study folder"
            )
        record = CellRecord.from_dict(values)
        for name, (said, kind) in _TYPES.items():
            if not isinstance(getattr(record, name), kind):
                raise TypeError(f"{name} must be {said}")
        return record
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path}, line {number}: not a record of a study ({type(error).__name__}: {error}); the file was damaged: remove "
            "that line, and its cell will run again"
        ) from error


def _cannot_write(path: Path, error: OSError) -> ResourceError:
    return ResourceError(f"{path} cannot be written: {error.strerror}")
