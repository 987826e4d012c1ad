"""The work folder of a run, which survives a crash and is renamed to OUT when the run is complete.

``.OUT.partial/`` next to OUT holds ``model/``, the folder that becomes OUT; ``journal.jsonl``, the journal of finished blocks;
``run.json``, the description of the run; and ``windows.safetensors``, the calibration windows if the model generated any.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from thanos.calibration.kept import read_windows, write_windows
from thanos.calibration.windows import Calibration
from thanos.checkpoint.gguf_files import is_gguf
from thanos.errors import NumericsError, ResourceError, UserError, recurs
from thanos.events import LOG_NAME, RUN_NAME
from thanos.recipe import Recipe
from thanos.run.journal import Journal, current
from thanos.system.documents import json_text
from thanos.system.files import sync, write_atomically

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}
"""Endings of weight files, readable or not. A folder with a config and such a file is a model's folder."""


class WorkFolder:
    """The hidden folder next to an output folder, on the same file system.

    Attributes:
        out: the resolved path of the output folder.
        path: the work folder.
        model: the folder within it that becomes ``out``.
        journal: the journal of finished blocks.
        suffix: end of the work folder's name.
        unit: name of the units that are counted as finished, and key of their total number in ``run.json``.
        called: what the command calls the output folder.
    """

    suffix = "partial"
    unit = "blocks"
    called = "OUT"

    def __init__(self, out: Path) -> None:
        self.out = out.resolve()  # follows symbolic links, so that the work folder is on the disk of the output
        self.path = self.out.parent / f".{self.out.name}.{self.suffix}"
        self.model = self.path / "model"
        self.journal = Journal(self.path / "journal.jsonl")
        self._windows = self.path / "windows.safetensors"
        self._run, self._old = self.path / RUN_NAME, self.out.parent / f".{self.out.name}.old"

    @property
    def run(self) -> dict[str, Any]:
        """Description of the run that made the work folder; empty if there is none."""
        return _read(self._run)

    @property
    def completed_run(self) -> dict[str, Any]:
        """Description of the run that made OUT; empty if OUT has none."""
        return _read(self.out / RUN_NAME)

    @property
    def finished(self) -> int:
        """Number of finished blocks that a resumed run can keep."""
        if not self.run or not self.model.is_dir():
            return 0
        return sum(block is not None for block in current(self.journal.read()))

    @property
    def prepared(self) -> bool:
        """Whether a resumed run can keep something although nothing is finished."""
        return False

    @property
    def published(self) -> bool:
        """Whether ``model/`` was renamed to OUT, but the run ended before its cleanup."""
        return bool(self.run) and not self.model.exists() and self.out.is_dir()

    @property
    def is_complete(self) -> bool:
        """Whether OUT is the output of a complete run, and no unfinished run is left next to it."""
        return not self.published and not self.finished and (self.out / "pruning.json").is_file()

    def windows(self, recipe: Recipe) -> Calibration | None:
        """Return the windows that the model generated for the run; None if it generated none."""
        return read_windows(self._windows, recipe.calibration)

    def start(self, run: dict[str, Any], calibration: Calibration | None = None) -> None:
        """Create the work folder of a run; delete an existing one first.

        Windows that the model generated are kept: this takes long, and on CUDA it may give others the next time.

        Args:
            run: the description from :func:`~thanos.run.resume.describe_run`.
            calibration: the windows of the run; None if it makes them later.

        Raises:
            ResourceError: the folder cannot be created.
        """
        try:
            self.remove()
            self.model.mkdir(parents=True)
            if calibration is not None and (calibration.generated or calibration.rule == "generated"):
                write_windows(self._windows, calibration)
            # Written last and atomically: a folder with a run.json can be resumed.
            write_atomically(self._run, json_text(run).encode(), durable=True)
            sync(self.path.parent)
        except OSError as error:
            raise ResourceError(f"cannot write next to {self.called} {self.out}: {error.strerror}") from error

    def take_up(self, shards: set[str]) -> None:
        """Delete everything in ``model/`` that an interrupted run left, except these shards and the event log."""
        for path in self.model.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in shards | {LOG_NAME}:
                path.unlink()

    def remove(self) -> None:
        """Delete the work folder."""
        if not self.path.exists():
            return
        # A crash during the deletion must leave a consistent state. With an unfinished model, run.json is deleted first, so
        # that the rest is not resumed. After publishing, it is deleted last, since it marks the output as published.
        if self.model.exists():
            self._run.unlink(missing_ok=True)
        for path in sorted(self.path.iterdir(), key=lambda path: path == self._run):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.path.rmdir()

    def tidy(self, *, resume: bool) -> None:
        """Clean up after a crash: restore an old OUT, and delete a work folder from which nothing can be resumed.

        With ``resume``, the work folder of a published run stays, so that the run can be recognised.
        """
        if self._old.is_dir():
            if self.out.exists():
                shutil.rmtree(self._old)
            else:
                self._old.rename(self.out)
        if not self.finished and not (resume and (self.published or self.prepared)):
            self.remove()

    def publish(self, *, overwrite: bool) -> None:
        """Rename the finished folder to OUT, and delete the work folder.

        A rename is atomic, so OUT is never a half-written folder. Raises UserError if OUT was created during the run, and
        ``overwrite`` is not set.
        """
        for path in (*self.model.iterdir(), self.model):
            sync(path)
        replaces = self.out.is_dir() and any(self.out.iterdir())
        if replaces:
            if not overwrite:
                raise UserError(
                    f"{self.called} {self.out.name} was created during the run; the result is kept. Move it away and give "
                    "--resume, or give both options: --resume takes the result, --overwrite lets it replace "
                    f"{self.called}"
                )
            # Two renames are not atomic together. After a crash between them, tidy() restores the old OUT.
            shutil.rmtree(self._old, ignore_errors=True)
            self.out.rename(self._old)
        try:
            self.model.rename(self.out)
        except BaseException:
            if replaces:
                self._old.rename(self.out)
            raise
        sync(self.out.parent)
        self.remove()
        shutil.rmtree(self._old, ignore_errors=True)


@contextmanager
def kept(work: WorkFolder) -> Iterator[None]:
    """Keep the work folder of a run that ends early, if the run can be resumed; else remove it."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, FileNotFoundError) and not work.path.exists():
            raise ResourceError(f"{work.path} was deleted during the run, with all finished work") from error
        # A resumed run would fail with the same NaN again.
        if isinstance(error, NumericsError) or not (work.finished or work.prepared):
            with suppress(OSError):
                work.remove()
        elif not recurs(error):
            error.add_note(
                f"{work.finished} of {work.run[work.unit]} {work.unit} are finished; resume=True continues from them"
            )
        raise


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def check_output(out: Path, *, model: Path | None, overwrite: bool, name: str = "OUT") -> None:
    """Check that an output folder may be written. Changes nothing.

    ``model`` is the input model's folder or file, which must not be overwritten; None if it is not local. ``name`` is what the
    command calls ``out``.

    Raises UserError if ``out`` is a file, is or contains the model, is inside a model's folder, or is not empty and may not be
    replaced: ``overwrite`` is not set, or ``out`` is no checkpoint. Raises ResourceError if the parent folder is not writable,
    or cannot be created.
    """
    resolved = out.resolve()
    if model is not None:
        model = model.resolve()
        if resolved == model or model in resolved.parents:
            raise UserError(f"{name} {out} is the model's own folder, or inside it; choose a folder outside {model}")
        if resolved in model.parents:
            raise UserError(f"{name} {out} holds the model {model}, which would be lost; choose another folder")
    refuse_inside_model(out, name)
    swapped = "; MODEL comes first, then OUT" if model is None and _is_model(resolved) else ""
    if resolved.exists() and not resolved.is_dir():
        raise UserError(f"{name} {out} is a file; give the name of a folder{swapped}")
    _check_parent(out, resolved, name)
    if resolved.is_dir() and any(resolved.iterdir()):
        if not overwrite:
            raise UserError(
                f"{name} {out} exists and is not empty; choose another folder, or give --overwrite{swapped}"
            )
        if not any(resolved.glob("*.safetensors")) and not (resolved / "config.json").exists():
            raise UserError(
                f"{name} {out} is not a model checkpoint, so --overwrite will not delete it; choose another folder"
            )


def refuse_inside_model(out: Path, name: str = "OUT") -> None:
    """Raise UserError if ``out`` lies in a model's folder; ``name`` is what the command calls it."""
    for folder in out.resolve().parents:
        if holds_model(folder):
            raise UserError(f"{name} {out} is inside the folder of another model, {folder}; choose a folder outside it")


def holds_model(folder: Path) -> bool:
    """Return whether a folder holds a model or an adapter, with its weights."""
    configured = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
    return configured and any(path.suffix.lower() in _WEIGHTS for path in folder.glob("*.*"))


def _check_parent(out: Path, resolved: Path, name: str) -> None:
    """Raise ResourceError if OUT cannot be created in its parent folder."""
    parent = resolved.parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise ResourceError(f"cannot write next to {name} {out}: {parent} is a file; choose a path in a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ResourceError(
            f"cannot write next to {name} {out}: you have no permission to write in {parent}; choose another folder"
        )


def _is_model(path: Path) -> bool:
    return is_gguf(path) if path.is_file() else (path / "config.json").is_file()


def check_interrupted(work: WorkFolder, *, resume: bool, overwrite: bool, own: bool = True) -> None:
    """Raise UserError if there is an interrupted run, and the user chose neither to resume it nor to overwrite it.

    ``own``: whether the command that checks can resume the run.
    """
    if not (resume or overwrite) and (line := interrupted_line(work, own=own)):
        raise UserError(line)


def interrupted_line(work: WorkFolder, *, own: bool = True) -> str:
    """Return in one line how far an interrupted run is, and the options for it; empty if there is none."""
    if not (finished := work.finished):
        return ""
    line = f"an interrupted run of {work.called} {work.out.name} finished {finished} of {work.run[work.unit]} {work.unit}; "
    if own:
        return f"{line}--resume continues it, --overwrite starts over"
    return f"{line}its own command continues it with --resume, and --overwrite discards it; or give another OUT"
