"""Resuming an interrupted run: check that it is the same run, and find the blocks that are still valid."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from thanos._version import __version__
from thanos.calibration.text import files_sha256, text_sha256
from thanos.checkpoint.writer import CheckpointWriter
from thanos.engine.records import BlockRecord
from thanos.errors import UserError
from thanos.events import RUN_NAME, Event
from thanos.run.journal import Journal, comes_after, current
from thanos.run.names import public_name
from thanos.system.meter import PhaseMeter

if TYPE_CHECKING:
    from thanos.calibration.windows import Calibration
    from thanos.model.source import ModelSource
    from thanos.recipe import Recipe
    from thanos.run.work_folder import WorkFolder

SCHEMA = 1
"""Version of ``run.json`` and ``journal.jsonl``; increased when a run with the old files cannot be resumed any more."""

_START = 1 << 20  # bytes at the start of a model's file that are hashed
_MUST_BE_EQUAL = ("schema", "thanos_version", "versions", "recipe", "model", "calibration", "text")

TEXT_HASH = "sha256 of the calibration text"
"""Key of a hash in the part ``text`` of ``run.json``; it exists if the calibration text is local."""

_RESUMED_WITH = {
    "threads": "resumed with another number of threads (--threads)",
    "processes": "resumed with another number of processes",
}


def describe_run(recipe: Recipe, source: ModelSource, device: torch.device) -> dict[str, Any]:
    """Return the description that identifies a run, as in ``run.json``. The caller adds ``calibration`` and ``blocks``.

    It holds the size of each of the model's files and a hash of its first MiB, which includes a shard's header. Larger files
    also have their time of modification, because hashing them whole would take as long as pruning.
    """
    # Explicit and default sparsity compare equal.
    return describe(recipe.to_dict() | {"sparsity": recipe.resolved_sparsity}, describe_model(source), device)


def describe(recipe: dict[str, Any], model: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the description that identifies a run with this recipe, on files described by :func:`describe_model`.

    Files of prompts are identified by their names and the start of their hash.
    """
    import transformers

    if prompts := recipe.get("prompts"):
        found = files_sha256(prompts)
        state = "missing" if found is None else f"SHA-256 {found[:16]}"
        recipe = recipe | {"prompts": f"{public_name(prompts)} ({state})"}

    return {
        "schema": SCHEMA,
        "thanos_version": __version__,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "recipe": recipe,
        "model": model,
        "machine": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
        },
    }


def describe_model(source: ModelSource) -> dict[str, Any]:
    """Return the descriptions of a model's config and weight files, by file name."""
    files = source.gguf_parts or [source.folder / "config.json", *source.folder.glob("*.safetensors*")]
    return {path.name: _describe_file(path) for path in sorted(files)}


def completed_run(run: Mapping[str, Any], recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Return the description of a run for its finished output. It has no local folders, since the output may be published.

    ``run`` comes from :func:`describe_run`. ``folder`` is the output folder, with all shards.
    """
    kept = {part: run[part] for part in _MUST_BE_EQUAL if part in run}
    return _without_folders({"text": describe_text(recipe)} | kept) | {"output": _describe_output(folder)}


def check_completed(work: WorkFolder, recipe: Recipe, now: Mapping[str, Any], calibration: Calibration | None) -> None:
    """Check that a complete output was made by this run. Reads no weights.

    If the user gave windows (``calibration``), they are compared; if not, local calibration files, by their hash. Raises
    UserError if another run made the output (the message lists every difference), if a shard is missing or has another size,
    or if the output has no description of its run.
    """
    before, out = work.completed_run, work.out
    otherwise = f"choose another {work.called}, or give --overwrite to start over"
    if not before:
        raise UserError(
            f"{work.called} {out} is complete, but has no {RUN_NAME} that says which run made it; {otherwise}"
        )
    known = {"text": describe_text(recipe)} if calibration is None else {"calibration": calibration.to_dict()}
    found = find_differences(before, _without_folders({**now, **known}))
    if found:
        raise UserError(f"{work.called} {out} is complete, but another run made it: {'; '.join(found)}; {otherwise}")
    sizes = _describe_output(out)
    for name, size in before.get("output", {}).items():
        if sizes.get(name) != size:
            raise UserError(
                f"{work.called} {out} was complete, but its {name} is now missing or of another size; {otherwise}"
            )


def _without_folders(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's description with only the file names of local texts. Their content is compared by its hash."""
    named = {"recipe": "calibration", "calibration": "source"}
    return {
        part: {**value, named[part]: public_name(str(value[named[part]]))} if part in named else value
        for part, value in run.items()
    }


def describe_text(recipe: Recipe) -> dict[str, str]:
    """Return the hash of the calibration text if it consists of local files, else nothing. No windows are needed for it."""
    found = text_sha256(recipe.calibration)
    return {} if found is None else {TEXT_HASH: found}


def _describe_output(folder: Path) -> dict[str, int]:
    """Return file name → size in bytes, for the shards and their index."""
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors*"))}


def check_same_run(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return notes on differences of the machine, which may change the last bits, between an interrupted run and this one.

    Parts that ``now`` does not have yet are not compared. Raises UserError, which lists every difference, if the runs differ.
    """
    found, now = find_differences(before, now), json.loads(json.dumps(now))
    if found:
        raise UserError(
            f"this is not the run that was interrupted: {'; '.join(found)}; give the original command with --resume, or, "
            "instead of --resume, --overwrite to start over"
        )
    return [
        f"{_RESUMED_WITH.get(name, 'resumed on another machine')}: {line}; the result may differ by rounding from that of an "
        "uninterrupted run"
        for name in {**(before.get("machine") or {}), **now.get("machine", {})}
        for line in _differences(name, (before.get("machine") or {}).get(name), now.get("machine", {}).get(name))
    ]


def find_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line for each difference between the descriptions of two runs, except differences of the machine.

    Parts that ``now`` does not have are not compared.
    """
    now = json.loads(json.dumps(now))  # lists instead of tuples, as in the description that was read from JSON
    found = []
    for part in _MUST_BE_EQUAL:
        # A run on given windows does not describe the text.
        compared = part in now and (part != "text" or part in before)
        lines = list(_differences(part, before.get(part), now[part])) if compared else []
        if part == "model" and len(lines) > 3:  # another model: one line need not name its hundred shards
            lines[2:-1] = [f"{len(lines) - 3} more such differences"]
        found += lines
    return found


def _differences(name: str, before: Any, now: Any) -> Iterator[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in [*before, *(key for key in now if key not in before)]:
            # Recipe settings, model files, versions and texts are named without the part that holds them.
            inner = key if name in ("recipe", "model", "versions", "text") else f"{name} {key}"
            yield from _differences(inner, before.get(key), now.get(key))
    elif isinstance(before, Mapping) or isinstance(now, Mapping):
        yield f"{name} is {'gone' if now is None else 'new'}"
    elif before != now:
        yield f"{name} {_show(before)} → {_show(now)}"


def _show(value: Any) -> str:
    if value is None:
        return "none"
    text = str(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _describe_file(path: Path) -> dict[str, Any]:
    status = path.stat()
    with path.open("rb") as file:
        start = hashlib.sha256(file.read(_START)).hexdigest()[:16]
    if status.st_size <= _START:
        return {"bytes": status.st_size, "sha256": start}
    seconds, nanoseconds = divmod(status.st_mtime_ns, 10**9)
    changed = f"{datetime.fromtimestamp(seconds, UTC):%F %T}.{nanoseconds:09}"
    return {"bytes": status.st_size, "sha256 of the start": start, "changed": changed}


class RunJournal:
    """The finished blocks of a run: their tensors are on the disk, and the journal has their records.

    Args:
        journal: journal file of this run.
        writer: writer of the output's shards.
        meter: meter of the run; :meth:`verify` adds the seconds of the interrupted run to it.

    Attributes:
        finished: the valid record of each finished block. If a block is solved again with another result, the records of later
            blocks are removed.
    """

    def __init__(self, journal: Journal, writer: CheckpointWriter, meter: PhaseMeter) -> None:
        self._journal, self._writer, self._meter = journal, writer, meter
        self.finished: dict[int | None, BlockRecord] = {}
        self._damaged: dict[int | None, BlockRecord] = {}

    def verify(self, emit: Callable[[Event], None]) -> None:
        """Read the journal, and compare every finished tensor with its checksum. A note event reports each damaged block."""
        records = self._journal.read()
        if records:
            self._meter.add(records[-1].phases)
        held = current(records)
        emit(Event(kind="phase", phase="verify", total=len(held)))
        for done, (block, record) in enumerate(held.items(), 1):
            with self._meter.phase("verify"):
                damaged = [name for name, known in record.tensors.items() if self._writer.checksum(name) != known]
            if damaged:
                self._damaged[block] = record
                again = "the part after the blocks" if block is None else f"block {block + 1}"
                line = f"{damaged[0]} differs from what was written (checksum); {again} is processed again"
                emit(Event(kind="note", phase="verify", message=line))
            else:
                self.finished[block] = record
                for layer in record.layers:
                    if layer.removed_units is not None:
                        self._writer.removes(layer.name, layer.removed_units)
                for name in record.tensors:
                    self._writer.accept(name)
            emit(Event(kind="progress", phase="verify", done=done, total=len(held)))

    def record(self, record: BlockRecord, written: Sequence[str]) -> None:
        """See :meth:`~thanos.engine.records.BlockJournal.record`."""
        with self._meter.phase("write"):
            self._writer.flush()
            tensors = {name: self._writer.take_checksum(name) for name in written}
        record = replace(record, tensors=tensors, phases=self._meter.records())
        with self._meter.phase("write"):
            self._journal.append(record)
        before = self._damaged.pop(record.block, None)
        # With other bytes than before, the block has other outputs: the records of all later blocks are invalid.
        if before is not None and before.tensors != tensors:
            for records in (self.finished, self._damaged):
                for other in [other for other in records if comes_after(other, record.block)]:
                    del records[other]
        self.finished[record.block] = record
