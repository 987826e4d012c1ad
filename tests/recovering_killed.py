"""A recovery that the kernel kills at a chosen moment: nothing of the process runs afterwards, as after a loss of power."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch

import thanos
from thanos.recovery import watch
from thanos.recovery.states import RecoveryFolder


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run(model: Path, dense: Path, out: Path, settings: dict[str, Any], moment: tuple[str, int], threads: int) -> None:
    """Recover, and die at ``("step", n)`` of the training, or while the states of a step are written.

    ``("best", n)``: the best state of step n is written, its checkpoint is not marked. ``("checkpoint", n)``: the checkpoint's
    files are written, but it is not marked. ``threads``: those of the process that will resume it, whose bits are compared.
    """
    torch.set_num_threads(threads)
    kind, number = moment
    watch.CHECKPOINT_SECONDS, watch.CHECKPOINT_FRACTION = 0.0, float("inf")
    write, complete = RecoveryFolder.write_best, RecoveryFolder.complete_checkpoint

    def write_best(self: RecoveryFolder, step: int, *args: Any) -> None:
        write(self, step, *args)
        if moment == ("best", step):
            die()

    def complete_checkpoint(self: RecoveryFolder, step: int, *args: Any) -> None:
        if moment == ("checkpoint", step):
            die()
        complete(self, step, *args)

    def look(event: thanos.Event) -> None:
        if kind == "step" and event.kind == "progress" and event.phase == "train" and event.done == number:
            die()

    folder: Any = RecoveryFolder
    folder.write_best, folder.complete_checkpoint = write_best, complete_checkpoint
    recipe = thanos.RecoveryRecipe.from_dict(settings)
    thanos.recover(model, out, dense=dense, recipe=recipe, resume=True, on_event=look)
