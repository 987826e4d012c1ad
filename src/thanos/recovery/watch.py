"""The callbacks of a training: they mask gradients, report losses, call the guard, and mark complete checkpoints.

Import this module only after :func:`~thanos.recovery.setup.require_trainer`: the Trainer needs accelerate.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback

from thanos.errors import NumericsError
from thanos.events import Event
from thanos.recovery.guard import HELD_OUT

if TYPE_CHECKING:
    from thanos.recovery.trainer import Training

PREFIX = "student."
"""Prefix of the pruned model's parameter names in the trained module."""

CHECKPOINT_SECONDS = 60.0
"""Least time between two checkpoints, in seconds. They are written at the end of an epoch. A checkpoint takes longer than an
epoch of a small model, so checkpoints after every epoch would take most of the run."""

CHECKPOINT_FRACTION = 0.1
"""Largest part of the time that checkpoints take: the next one is written when the last one took at most this fraction of the
time since then."""

READ_SECONDS = 0.5
"""Seconds between two readings of the losses on CUDA."""


class Watch(TrainerCallback):
    """The callbacks of one training.

    Attributes:
        ended: why the training ended early; empty if it did not.
    """

    def __init__(self, training: Training) -> None:
        self._training = training
        self.trainer: Any = None
        self.ended = ""
        self._loss: Any = 0.0
        self._unread: list[Tensor] = []
        self._read = self._saved = time.monotonic()
        self._began, self._cost = 0.0, 0.0
        self._epoch_loss, self._resumed = 0.0, 0
        self._masked: list[tuple[Tensor, Tensor]] = []

    def add(self, loss: Tensor) -> None:
        """Add the loss of a micro-batch, already divided by the number of micro-batches in a step."""
        self._loss = self._loss + loss.detach().double()

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Set the gradients of removed weights to zero.

        This happens before the norm is clipped, so these gradients count neither in the norm nor in AdamW's moments. AdamW does
        not change a weight whose gradients were all zero, so the weights themselves need no mask.
        """
        if not self._masked:
            parameters = dict(self.trainer.model.named_parameters())
            named = ((parameters[PREFIX + name], mask) for name, mask in self._training.masks.items())
            self._masked = [(parameter, _local(_sharded_like(mask, parameter))) for parameter, mask in named]
        pairs = [(_local(p.grad), mask) for p, mask in self._masked if p.grad is not None]
        if pairs:
            gradients, masks = zip(*pairs, strict=True)
            torch._foreach_mul_(gradients, masks)  # type: ignore[reportPrivateImportUsage]

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure the model before the training, unless the run is resumed; set the learning rate."""
        training = self._training
        self._resumed = state.global_step
        training.emit(Event(kind="phase", phase="train", done=state.global_step, total=training.recipe.steps))
        if not training.guard.history:
            self._measure(state, None)
        self.trainer.set_rate(training.recipe.largest_rate(training.guard.history, training.size), state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report the step; at the end of an epoch measure the held-out loss."""
        training, step = self._training, state.global_step
        self._unread.append(torch.as_tensor(self._loss))
        self._loss = 0.0
        whole_epoch = step % training.recipe.steps_per_epoch == 0
        if not (whole_epoch or self._reads()):
            return
        if not self._report(step):
            control.should_training_stop, control.should_save = True, False
        elif whole_epoch:
            self._measure(state, self._epoch_loss)
            self._epoch_loss = 0.0
            control.should_save = training.world.from_first(self._saves)
            self._began = time.monotonic()

    def _saves(self) -> bool:
        """Whether to write a checkpoint now."""
        since = time.monotonic() - self._saved
        return since >= CHECKPOINT_SECONDS and self._cost <= CHECKPOINT_FRACTION * since

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the best state, and mark the checkpoint as complete."""
        training = self._training
        with training.meter.phase("checkpoint"):
            training.guard.store()
            training.world.sum_(torch.zeros(1, device=training.device))  # every process has written its part
            if training.world.rank == 0:
                training.folder.complete_checkpoint(state.global_step, training.guard.best["step"])
        self._saved = time.monotonic()
        self._cost = self._saved - self._began

    def _reads(self) -> bool:
        """Whether to read the losses of the last steps now. On CUDA that synchronises with the device, so it is done rarely."""
        training = self._training
        return (
            training.device.type != "cuda" or training.world.size > 1 or time.monotonic() - self._read >= READ_SECONDS
        )

    def _report(self, last: int) -> bool:
        """Report the steps since the last report, up to step ``last``; return whether all their losses are finite."""
        training = self._training
        losses = (training.world.sum_(torch.stack(self._unread)) / training.world.size).tolist()
        self._unread, self._read = [], time.monotonic()
        for step, loss in enumerate(losses, last - len(losses) + 1):
            if not math.isfinite(loss):
                self.ended = f"the loss of step {step} is NaN or infinite"
                return False
            tokens = (step - self._resumed) * training.recipe.batch * training.ids.shape[1]
            training.emit(
                Event(kind="progress", phase="train", done=step, total=training.recipe.steps, tokens=tokens, loss=loss)
            )
            self._epoch_loss += loss / training.recipe.steps_per_epoch
        return True

    def _measure(self, state: Any, loss: float | None) -> None:
        training = self._training
        epoch = state.global_step // training.recipe.steps_per_epoch
        with training.meter.phase("held-out"):
            entry = training.guard.measure(self.trainer.model, PREFIX, state.global_step, epoch, loss)
        if not state.global_step and entry[HELD_OUT] is None:
            raise NumericsError(
                "the divergence from the dense model is NaN or infinite before the training: a weight of one of the models is "
                "NaN or infinite, or its activations overflow"
            )
        state.log_history = list(training.guard.history)  # saved and restored with the checkpoint
        training.emit(
            Event(
                kind="epoch",
                phase="train",
                done=epoch,
                total=training.recipe.epochs,
                loss=loss,
                held_out=entry[HELD_OUT],
            )
        )


def _sharded_like(mask: Tensor, value: Tensor) -> Tensor:
    """Return the mask, sharded if ``value`` is. Each process has the whole mask, so nothing is sent."""
    if not isinstance(value, DTensor):
        return mask
    return distribute_tensor(mask, value.device_mesh, value.placements, src_data_rank=None)


def _local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor that may be sharded, without a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
