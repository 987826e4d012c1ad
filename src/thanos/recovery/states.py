"""The states of a training in the work folder: the best one for the output, and the Trainer's checkpoints.

``best-N/`` contains the trained tensors after step N in the files, offsets and dtypes of the output. ``steps/checkpoint-N/``
contains the state from which the training continues: float32 weights, the optimizer's state, and the history of the held-out
loss. A checkpoint is complete if it has its mark. The mark is written after everything else is on the disk, the best state
included. So at any moment, the newest checkpoint with a mark and the best state in its history are complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from thanos.calibration.generation import Part
from thanos.checkpoint.layout import Checkpoint
from thanos.checkpoint.writer import CheckpointWriter
from thanos.run.work_folder import WorkFolder
from thanos.system.files import sync, write_atomically

MARK = "finished"
"""Empty file of a complete checkpoint."""

STATE = "trainer_state.json"
"""File of the Trainer; its ``log_history`` has an entry for each measurement of the held-out loss."""

BYTES_PER_PARAMETER = 2 * 12
"""Bytes on the disk for checkpoints, per trained parameter: float32 weights and two moments, twice, since an old checkpoint is
deleted when the new one is complete."""


class RecoveryFolder(WorkFolder):
    """The work folder of a recovery, ``.OUT.recovery``. That of a pruning run has another name.

    Attributes:
        steps: folder of the Trainer's checkpoints.
    """

    suffix = "recovery"
    unit = "steps"
    called = "OUT2"

    def __init__(self, out: Path) -> None:
        super().__init__(out)
        self.steps = self.path / "steps"
        self._generated = self.steps / "generated.safetensors"

    @property
    def finished(self) -> int:
        """Number of finished steps that a resumed run can keep."""
        newest = self.newest if self.run and self.model.is_dir() else None
        return 0 if newest is None else _number(newest)

    @property
    def prepared(self) -> bool:
        """Whether the dense model has generated text: a resumed run keeps it, also without a checkpoint."""
        generated = self._generated.is_file() or any(self._parts())
        return bool(self.run) and self.model.is_dir() and generated

    @property
    def is_complete(self) -> bool:
        """Whether OUT is the output of a complete recovery, and no unfinished one is left next to it."""
        return not (self.published or self.finished or self.prepared) and bool(self.completed_run)

    @property
    def newest(self) -> Path | None:
        """The newest complete checkpoint; None without one."""
        complete = [path for path in self._checkpoints() if (path / MARK).is_file()]
        return max(complete, key=_number, default=None)

    def history(self) -> list[dict[str, Any]]:
        """Return the guard's history up to the newest checkpoint; see :class:`~thanos.recovery.guard.Guard`."""
        newest = self.newest
        return [] if newest is None else json.loads((newest / STATE).read_bytes())["log_history"]

    @property
    def generated(self) -> Tensor | None:
        """The sequences that the dense model generated, (n, T) int64; None without them."""
        return load_file(self._generated)["ids"] if self._generated.is_file() else None

    def keep_generated(self, ids: Tensor) -> None:
        """Store the sequences that the dense model generated, and delete the parts.

        On a GPU it would not generate the same ones again.
        """
        write_atomically(self._generated, lambda path: save_file({"ids": ids}, path), durable=True)
        self.drop_parts()

    @property
    def generated_parts(self) -> list[Part]:
        """The parts of the sequences that were generated before an interruption, in order."""
        stored = [load_file(path) for path in self._parts()]
        return [Part(tensors.pop("ids"), tensors) for tensors in stored]

    def keep_part(self, part: Part) -> None:
        """Store the next part of the sequences that the dense model generates."""
        path = self.steps / f"pieces-{len(self._parts()):06}.safetensors"
        write_atomically(path, lambda path: save_file({"ids": part.ids, **part.states}, path), durable=True)

    def drop_parts(self) -> None:
        """Delete the parts of generated sequences."""
        for path in self._parts():
            path.unlink()

    def _parts(self) -> list[Path]:
        return sorted(self.steps.glob("pieces-*.safetensors"))

    def complete_checkpoint(self, step: int, keep_best: int) -> None:
        """Force the checkpoint of a step to the disk and mark it. Then delete older checkpoints and best states.

        Args:
            step: number of the step.
            keep_best: step of the best state, which is kept; 0 for the original model.
        """
        folder = self.steps / f"checkpoint-{step}"
        for path in [*folder.rglob("*"), folder]:
            sync(path)
        (folder / MARK).touch()
        sync(folder)
        sync(self.steps)
        for path in self._checkpoints():
            if path != folder:
                shutil.rmtree(path)
        self._delete_best(but=keep_best)

    def tidy_states(self, best: int) -> None:
        """Delete what a crash may have left: checkpoints without a mark, and best states other than that of step ``best``."""
        for path in self._checkpoints():
            if not (path / MARK).is_file():
                shutil.rmtree(path)
        self._delete_best(but=best)

    def write_best(self, step: int, checkpoint: Checkpoint, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write a best state.

        Args:
            step: number of the step.
            checkpoint: checkpoint of the pruned model, whose layout and dtypes are used.
            tensors: pairs of the name in the checkpoint and the tensor in the checkpoint's dtype.
        """
        folder = self._best(step)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        writer = CheckpointWriter(checkpoint.layout, checkpoint, folder)
        for name, tensor in tensors:
            writer.write(name, tensor)
        writer.flush()

    def read_best(self, step: int, checkpoint: Checkpoint) -> Callable[[str], Tensor]:
        """Return a function that reads a tensor of a best state by its name in the checkpoint."""
        return CheckpointWriter(checkpoint.layout, checkpoint, self._best(step)).read

    def _best(self, step: int) -> Path:
        return self.path / f"best-{step}"

    def _delete_best(self, *, but: int) -> None:
        for path in self.path.glob("best-*"):
            if path != self._best(but):
                shutil.rmtree(path)

    def _checkpoints(self) -> Iterator[Path]:
        yield from self.steps.glob("checkpoint-*")


def _number(path: Path) -> int:
    return int(path.name.rpartition("-")[2])
