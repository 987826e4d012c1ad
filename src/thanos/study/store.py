"""``store.jsonl``: one record per cell of a study, appended and never changed. docs/formats.md describes the format.

A cell may have several records, since the next run repeats a failed cell. The last record is valid.
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
"""Version of the format; increased when a reader of the old format would misread the new one."""

STORE_NAME = "store.jsonl"

PACKED_NAME = "store.jsonl.gz"
"""The store compressed by gzip to a tenth. It is read if there is no plain store, and unpacked when the study continues."""

_FORMER_METHODS = ("formula",)  # methods of older versions; their records stay in the store but are not read

_OBJECTS = ("versions", "machine", "cell", "asked", "sources", "phases")
_OBJECTS_OR_NULL = ("recipe", "calibration", "effective_sparsity", "evaluation", "zero_shot")
_TYPES: dict[str, tuple[str, type | UnionType]] = {
    **dict.fromkeys(("key", "status", "date"), ("a string", str)),
    **dict.fromkeys(_OBJECTS, ("an object", dict)),
    **dict.fromkeys(_OBJECTS_OR_NULL, ("an object or null", dict | None)),
    "layers": ("a list", list),
}
"""Field of a record → its type in words and in Python, which the parser checks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CellRecord(Document):
    """One cell of a study: its settings and its results. The attributes are the keys of a line.

    A failed record keeps the results that were complete before the failure. Reports do not use them.

    Attributes:
        key: hash of ``cell`` and ``asked``, see :func:`cell_key`.
        status: ``done`` or ``failed``.
        reason: reason of the failure, one line; None for ``done``.
        date: end of the cell, ISO 8601 in UTC.
        commit: commit of the source tree, with ``+changes`` if the tree was not clean; None if unknown.
        thanos_version: version of the package.
        versions: versions of Python and the packages that affect the numbers.
        machine: ``device``, ``platform``, ``cores``, ``memory_bytes``, and ``sharers``, the number of workers on the device.
        cell: the coordinates in the grid: ``model``, ``method`` (``dense`` for the unpruned model), ``pattern``,
            ``sparsity``, ``outlier_rows``, ``keep_budget``, ``block_size``, ``damping``, ``calibration``, ``samples``,
            ``sequence_length``, ``seed``, and those of :data:`~thanos.study.grid.NEWER` that are not the default. All but the
            model and the method are None for the dense model.
        asked: the other settings that affect the numbers: ``dtype``, ``evaluation`` (``text``, ``sequence_length``,
            ``max_windows``, ``compare``: with the dense model) and ``zero_shot`` (``tasks``, ``limit``; None without
            tasks). Both are None for a model with ``cost_only``. ``bos`` (``auto``, ``window`` or ``text``) exists only if
            the tokenizer begins texts with a beginning-of-text token: calibration windows then begin with it, and ``bos``
            is its position in evaluation.
        sources: sha256 of ``model``, ``calibration``, ``text`` and ``tasks`` as files; None if there is no file.
        recipe: the whole recipe, as in pruning.json; None for the dense model.
        calibration: the windows' fingerprint, as in pruning.json; None for the dense model.
        effective_sparsity: measured fractions of zeros, ``targeted`` (pruned layers) and ``all`` (parameters).
        evaluation: ``text``, ``text_sha256``, ``sequence_length``, ``bos`` (``window``, ``text``, ``none``), ``windows``,
            ``tokens``, ``perplexity``, ``mean_loss``, ``kl_divergence``, ``top1_agreement``.
        zero_shot: ``tasks`` (name → ``acc``, ``acc_stderr``, ``acc_norm``, ``acc_norm_stderr``, ``samples``) and
            ``average`` (the same without ``samples``); None without tasks.
        layers: the layers, as in pruning.json.
        phases: seconds and peak memory by phase: those of pruning.json, then ``reference`` (loading the dense model and
            the text, unless the worker had them already), ``evaluate`` (including loading the model, unless it is the
            dense one of ``reference``) and ``zero_shot`` (on the same model).
        seconds: seconds of pruning, without evaluation.
        host_peak_bytes: peak of host memory during pruning.
        device_peak_bytes: peak of device memory during pruning; None without a CUDA device.
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
    """The contents of a store.

    Attributes:
        records: the last record of each cell, in the order in which the cells were first recorded.
        warnings: messages for the user, for example about an incomplete last line.
    """

    records: list[CellRecord]
    warnings: list[str]

    @property
    def done(self) -> list[CellRecord]:
        """The records of cells with results."""
        return [record for record in self.records if record.status == "done"]

    @property
    def failed(self) -> list[CellRecord]:
        """The records of failed cells."""
        return [record for record in self.records if record.status == "failed"]


def cell_key(cell: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Return the sha256 of a record's ``cell`` and ``asked``, independent of the order of their keys."""
    text = json.dumps({"cell": cell, "asked": asked}, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_store(folder: str | Path) -> Contents:
    """Read the store of a study folder. This is safe while a study runs.

    Args:
        folder: the study's folder, or the path of a ``store.jsonl``; then only that file is read.

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
    """Appends records to the store of a study folder. The study's lock ensures that there is one writer at a time.

    Args:
        folder: the study's folder; it must exist. An incomplete last line and blank lines at the end of its store are removed.

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
            elif end > len(data):  # the last record is whole, but has no line end
                self._append(b"\n")
        except OSError as error:
            raise _cannot_write(self._path, error) from error

    def append(self, record: CellRecord) -> None:
        """Add one record and force it to the disk. Raises ResourceError if the file cannot be written."""
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
    """Return the path of the store in a study's folder: of the packed store if the plain one does not exist or is empty.

    If ``folder`` is the path of a store, it is returned unchanged.
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
        if "bos" in record.asked:  # replaces an older version's record of the cell, measured without that token
            records.pop(
                cell_key(record.cell, {name: each for name, each in record.asked.items() if name != "bos"}), None
            )
    if not torn:
        return records, []
    number = data.count(b"\n") + 1
    line = f"the last record is incomplete ({len(torn)} bytes) and was ignored; its cell will run again"
    return records, [f"{path}, line {number}: {line}"]


def _left_out(path: Path, records: Mapping[str, CellRecord], packed: Path) -> list[str]:
    """Return a warning if the packed store has cells that are missing from ``records``, those of the plain store."""
    try:
        lacking = len(_records(packed)[0].keys() - records.keys())
    except DataError as error:
        return [f"only {path} was read, since {packed} cannot be read ({error}); remove one of the two"]
    if not lacking:
        return []
    return [
        f"{packed} has {lacking} {'cell' if lacking == 1 else 'cells'} not in {path}; only {path.name} was read: "
        f"remove {path.name} to continue with {packed.name}, or {packed.name} if it is not needed"
    ]


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.name == PACKED_NAME else data
    except (OSError, EOFError, zlib.error) as error:
        said = getattr(error, "strerror", None) or error
        raise DataError(
            f"{path} cannot be read ({said}); give the folder of a study, which contains {STORE_NAME}"
        ) from error


def _split(data: bytes) -> tuple[list[bytes], bytes]:
    """Return the complete lines, and the incomplete last line. A whole record without a line end counts as complete.

    White space at the end, which editors add, is dropped.
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
        if type(schema) is not int:  # not isinstance, which accepts a bool
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
            f"{path}, line {number}: not a record of a study ({type(error).__name__}: {error}); the file is damaged: remove "
            "this line, and its cell will run again"
        ) from error


def _cannot_write(path: Path, error: OSError) -> ResourceError:
    return ResourceError(f"{path} cannot be written: {error.strerror}")
