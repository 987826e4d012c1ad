"""The training of a recovery, by transformers' ``Trainer``: on a CPU, one GPU, or several processes.

Import this module only after :func:`require_trainer`: the Trainer needs accelerate.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from thanos.engine.distributed import World
from thanos.errors import NumericsError
from thanos.events import Event
from thanos.model.experts import mixtures
from thanos.model.layers import find_blocks
from thanos.recovery.distance import Distillation
from thanos.recovery.guard import HELD_OUT, Guard
from thanos.recovery.isolation import own_state
from thanos.recovery.recipe import RecoveryRecipe, one_cycle
from thanos.recovery.sequences import Sequences
from thanos.recovery.states import RecoveryFolder

PREFIX = "student."
"""Prefix of the pruned model's parameter names in the trained module."""

CHECKPOINT_SECONDS = 60.0
"""Least time between two checkpoints, in seconds; they are written at the end of an epoch. An epoch of a small model takes less
time than its checkpoint, so a checkpoint after each would take most of the run."""

_WEIGHTS = "weights.safetensors"

BETAS, CLIP = (0.9, 0.95), 1.0
"""AdamW's decay rates, and the largest norm of a gradient; without weight decay, which would pull the weights
towards zero instead of the dense model."""


@dataclass(frozen=True, slots=True)
class Training:
    """The inputs of a training.

    Attributes:
        module: the student with its loss, loaded in float32.
        masks: parameter name in the student → bool mask of the weights that stay, on the device.
        ids: token ids of the sequences that are trained on, (n, T), on the CPU.
        guard: measures the held-out loss.
        recipe: the settings.
        folder: for the checkpoints.
        device: device of this process.
        world: the processes.
        tell: function that is called with events.
    """

    module: Distillation
    masks: Mapping[str, Tensor]
    ids: Tensor
    guard: Guard
    recipe: RecoveryRecipe
    folder: RecoveryFolder
    device: torch.device
    world: World
    tell: Callable[[Event], None]

    @property
    def micro_batch(self) -> int:
        """Number of sequences that a process runs at once."""
        return micro_batch(self.recipe, self.device, self.world.size)

    def run(self, resume_from: Path | None) -> str:
        """Train to the end, or until the loss is not a number.

        Args:
            resume_from: checkpoint of an interrupted training.

        Returns:
            Why the training ended early; empty if it did not.
        """
        with own_state(self.device):
            watch = _Watch(self)
            trainer = _RecoveryTrainer(self, _arguments(self), watch)
            trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
        return watch.ended


def micro_batch(recipe: RecoveryRecipe, device: torch.device, processes: int) -> int:
    """Return the number of sequences that a process runs at once."""
    return recipe.micro_batch or (recipe.batch // processes if device.type == "cuda" else 1)


def _arguments(training: Training) -> TrainingArguments:
    recipe, cuda = training.recipe, training.device.type == "cuda"
    shard = recipe.shard and training.world.size > 1
    layers = sorted({type(block).__name__ for block in find_blocks(training.module.student)[1]})
    arguments = TrainingArguments(
        output_dir=str(training.folder.steps),
        per_device_train_batch_size=training.micro_batch,
        gradient_accumulation_steps=recipe.batch // (training.micro_batch * training.world.size),
        max_steps=recipe.steps,
        learning_rate=recipe.rate,
        weight_decay=0.0,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        max_grad_norm=CLIP,
        optim="adamw_torch_fused" if cuda else "adamw_torch",
        bf16=cuda,
        use_cpu=not cuda,
        save_strategy="no",  # the callback says when
        logging_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        logging_nan_inf_filter=False,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=any(mixtures(training.module.student)),  # an expert may get no token of a batch
        fsdp=shard,  # type: ignore[arg-type]
        fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": layers, "state_dict_type": "SHARDED_STATE_DICT"},
        seed=recipe.seed,
    )
    plugin: Any = getattr(arguments, "fsdp_plugin_args", None)  # absent in older releases of transformers
    if plugin is not None:
        # By default the loss would be rounded to bfloat16, and gradients would be summed in it.
        plugin["mixed_precision_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if cuda else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    if arguments.world_size == 1:
        # Of several GPUs the run takes one: without this the Trainer would copy the model to all of them.
        arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


class _RecoveryTrainer(Trainer):
    """The Trainer with the loss, the schedule and the checkpoints of a recovery, and with masked gradients."""

    def __init__(self, training: Training, arguments: TrainingArguments, watch: _Watch) -> None:
        self._training, self._watch = training, watch
        super().__init__(
            model=training.module,
            args=arguments,
            train_dataset=Sequences(training.ids, training.recipe),
            callbacks=[watch],
        )
        self.remove_callback(PrinterCallback)
        watch.trainer = self

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        del args, kwargs
        return model(inputs["ids"])

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._watch.add(loss)
        # Before the gradient's norm is clipped: removed weights must not contribute to it, nor to AdamW's moments.
        self._watch.mask(gradients=True)
        return loss

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            steps = self._training.recipe.steps
            inner: Any = optimizer or self.optimizer
            self.lr_scheduler = LambdaLR(inner, lambda step: one_cycle(step, steps))
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)  # type: ignore[arg-type]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        del state_dict  # with tied weights it names tensors twice, which safetensors refuses
        if self.args.should_save and output_dir is not None:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            weights = {name: p.detach().contiguous() for name, p in self._training.module.named_parameters()}
            save_file(weights, Path(output_dir) / _WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        stored = load_file(Path(resume_from_checkpoint) / _WEIGHTS)
        with torch.no_grad():
            for name, parameter in self._training.module.named_parameters():
                parameter.copy_(stored[name])


class _Watch(TrainerCallback):
    """The callbacks around a step: masks, events, the guard, and the marks of checkpoints.

    Attributes:
        ended: why the training ended early; empty if it did not.
    """

    def __init__(self, training: Training) -> None:
        self._training = training
        self.trainer: Any = None
        self.ended = ""
        self._loss: Any = 0.0
        self._epoch_loss, self._resumed = 0.0, 0
        self._saved = time.monotonic()

    def add(self, loss: Tensor) -> None:
        """Add the loss of a micro-batch, already divided by the number of micro-batches in a step."""
        self._loss = self._loss + loss.detach().double()

    @torch.no_grad()
    def mask(self, *, gradients: bool = False) -> None:
        """Set the removed weights, or their gradients, to zero."""
        parameters = dict(self.trainer.model.named_parameters())
        for name, mask in self._training.masks.items():
            parameter = parameters[PREFIX + name]
            value = parameter.grad if gradients else parameter
            if value is not None:
                value.mul_(_sharded_like(mask, value))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        one = self._training
        self._resumed = state.global_step
        one.tell(Event(kind="phase", phase="train", done=state.global_step, total=one.recipe.steps))
        if not one.guard.history:
            self._measure(state, None)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.mask()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        one, step = self._training, state.global_step
        loss = float(one.world.sum_(self._loss)) / one.world.size
        self._loss = 0.0
        if not math.isfinite(loss):
            self.ended = f"the loss of step {step} is not a number"
            control.should_training_stop, control.should_save = True, False
            return
        tokens = (step - self._resumed) * one.recipe.batch * one.ids.shape[1]
        one.tell(Event(kind="progress", phase="train", done=step, total=one.recipe.steps, tokens=tokens, loss=loss))
        self._epoch_loss += loss / one.recipe.steps_per_epoch
        if step % one.recipe.steps_per_epoch == 0:
            self._measure(state, self._epoch_loss)
            self._epoch_loss = 0.0
            control.should_save = one.world.from_first(lambda: time.monotonic() - self._saved >= CHECKPOINT_SECONDS)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        one = self._training
        one.guard.store()
        one.world.sum_(torch.zeros(1, device=one.device))  # every process has written its part
        if one.world.rank == 0:
            one.folder.complete_checkpoint(state.global_step, one.guard.best["step"])
        self._saved = time.monotonic()

    def _measure(self, state: Any, loss: float | None) -> None:
        one = self._training
        epoch = state.global_step // one.recipe.steps_per_epoch
        entry = one.guard.measure(self.trainer.model, PREFIX, state.global_step, epoch, loss)
        if not state.global_step and entry[HELD_OUT] is None:
            raise NumericsError(
                "the divergence from the dense model is not a number before any training: a weight of one of the models holds "
                "NaN or infinity, or its activations overflow"
            )
        state.log_history = list(one.guard.history)  # saved and restored with the checkpoint
        one.tell(
            Event(kind="epoch", phase="train", done=epoch, total=one.recipe.epochs, loss=loss, held_out=entry[HELD_OUT])
        )


def _sharded_like(mask: Tensor, value: Tensor) -> Tensor:
    """Return a mask, sharded like ``value`` if that is sharded. Nothing is sent: each process has the whole mask."""
    if not isinstance(value, DTensor):
        return mask
    return distribute_tensor(mask, value.device_mesh, value.placements, src_data_rank=None)
