"""The folder in which OUT grows, which survives a crash, and the moment in which it becomes OUT.

``.OUT.partial/`` beside OUT holds ``model/``, the folder that OUT will be; ``journal.jsonl``, what is finished; and
``run.json``, which run it is.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from thanos.errors import ResourceError, UserError
from thanos.events import LOG_NAME, RUN_NAME
from thanos.run.journal import Journal, current
from thanos.system.documents import json_text
from thanos.system.files import sync, write_atomically


class WorkFolder:
    """The hidden sibling of an output folder, on the same file system.

    Args:
        out: the folder to be.

    Attributes:
        path: the work folder.
        model: the folder within it that becomes ``out``.
        journal: which blocks are finished.
    """

    def __init__(self, out: Path) -> None:
        self.out = out.resolve()  # where a symbolic link points: on the disk where the folder will be
        self.path = self.out.parent / f".{self.out.name}.partial"
        self.model = self.path / "model"
        self.journal = Journal(self.path / "journal.jsonl")
        self._run, self._old = self.path / RUN_NAME, self.out.parent / f".{self.out.name}.old"

    @property
    def run(self) -> dict[str, Any]:
        """What the run that made the folder said of itself; empty where there is none."""
        return _read(self._run)

    @property
    def completed_run(self) -> dict[str, Any]:
        """What the run that made OUT said of itself; empty where OUT is no such folder."""
        return _read(self.out / RUN_NAME)

    @property
    def finished(self) -> int:
        """Number of finished blocks that can be taken up again."""
        if not self.run or not self.model.is_dir():
            return 0
        return sum(block is not None for block in current(self.journal.read()))

    @property
    def published(self) -> bool:
        """Whether the run became OUT, and ended before it had cleared up."""
        return bool(self.run) and not self.model.exists() and self.out.is_dir()

    @property
    def is_complete(self) -> bool:
        """Whether OUT is a finished run's, and nothing is left of one that is not."""
        return not self.published and not self.finished and (self.out / "pruning.json").is_file()

    def start(self, run: dict[str, Any]) -> None:
        """Make the folder anew; what was there is deleted.

        Raises:
            ResourceError: the folder cannot be made.
        """
        try:
            self.remove()
            self.model.mkdir(parents=True)
            # Under its name run.json is whole: it is what makes the folder one that can be resumed.
            write_atomically(self._run, json_text(run).encode(), durable=True)
            sync(self.path.parent)
        except OSError as error:
            raise ResourceError(f"cannot write beside OUT {self.out}: {error.strerror}") from error

    def take_up(self, shards: set[str]) -> None:
        """Prepare the folder of an interrupted run: everything goes but its shards and its log."""
        for path in self.model.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in shards | {LOG_NAME}:
                path.unlink()

    def remove(self) -> None:
        """Delete the folder."""
        if not self.path.exists():
            return
        # Whatever a crash leaves must not be taken for more than it is: an unfinished model loses first what makes it
        # resumable; beside a published one, what tells that it was published goes last.
        if self.model.exists():
            self._run.unlink(missing_ok=True)
        for path in sorted(self.path.iterdir(), key=lambda path: path == self._run):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.path.rmdir()

    def tidy(self, *, resume: bool) -> None:
        """Put right what a crash left: an old OUT gets its name back, and a folder from which nothing can be resumed goes.

        Args:
            resume: whether the folder of a run that was published shall stay, so that it can be recognised.
        """
        if self._old.is_dir():
            if self.out.exists():
                shutil.rmtree(self._old)
            else:
                self._old.rename(self.out)
        if not self.finished and not (resume and self.published):
            self.remove()

    def publish(self, *, overwrite: bool) -> None:
        """Give the finished folder its name, and clear up.

        A rename either happens or not, so no half-written folder ever has the name OUT.

        Raises:
            UserError: OUT came into being meanwhile.
        """
        for path in (*self.model.iterdir(), self.model):
            sync(path)
        replaces = self.out.is_dir() and any(self.out.iterdir())
        if replaces:
            if not overwrite:
                raise UserError(
                    f"OUT {self.out.name} came into being during the run; move it away and give --resume, or --resume "
                    "--overwrite to replace it"
                )
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


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def check_output(out: Path, *, model: Path | None, overwrite: bool) -> None:
    """Refuse an output folder that may not be written. Changes nothing.

    Args:
        out: the folder to be.
        model: the input's folder or file, which must not be touched; None where it is not a local one.
        overwrite: whether an existing checkpoint at ``out`` may be replaced.

    Raises:
        UserError: ``out`` exists and is not empty, is a file, is or holds the model, or lies in a model's folder.
        ResourceError: its folder may not be written, or cannot be made.
    """
    resolved = out.resolve()
    if model is not None:
        model = model.resolve()
        if resolved == model or model in resolved.parents:
            raise UserError(f"OUT {out} is the model's own folder, or inside it; choose a folder outside {model}")
        if resolved in model.parents:
            raise UserError(f"OUT {out} holds the model {model}, which would be lost; choose another folder")
    for folder in resolved.parents:
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
            raise UserError(f"OUT {out} is inside the folder of another model, {folder}; choose a folder outside it")
    swapped = "; MODEL comes first, then OUT" if model is None and _is_model(resolved) else ""
    if resolved.exists() and not resolved.is_dir():
        raise UserError(f"OUT {out} is a file; give the name of a folder{swapped}")
    _check_parent(out, resolved)
    if resolved.is_dir() and any(resolved.iterdir()):
        if not overwrite:
            raise UserError(f"OUT {out} exists and is not empty; choose another folder, or give --overwrite{swapped}")
        if not any(resolved.glob("*.safetensors")) and not (resolved / "config.json").exists():
            raise UserError(
                f"OUT {out} is no model checkpoint, so --overwrite will not delete it; choose another folder"
            )


def _check_parent(out: Path, resolved: Path) -> None:
    """Refuse a place in which OUT cannot be made."""
    parent = resolved.parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise ResourceError(f"cannot write beside OUT {out}: {parent} is a file; choose a place in a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ResourceError(
            f"cannot write beside OUT {out}: you may not write in {parent}; choose a place that you may"
        )


def _is_model(path: Path) -> bool:
    return path.suffix == ".gguf" if path.is_file() else (path / "config.json").is_file()


def check_interrupted(work: WorkFolder, *, resume: bool, overwrite: bool) -> None:
    """Refuse to decide for the user what becomes of an interrupted run.

    Raises:
        UserError: there is one, and neither is asked for.
    """
    if work.finished and not (resume or overwrite):
        raise UserError(
            f"an interrupted run of OUT {work.out.name} finished {work.finished} of {work.run['blocks']} blocks; --resume "
            "goes on with it, --overwrite starts over"
        )
