"""The training of a recovery, by transformers' ``Trainer``: on a CPU, one GPU, or several processes.

Import this module only after :func:`~thanos.recovery.setup.require_trainer`: the Trainer needs accelerate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainingArguments

from thanos.engine.distributed import World
from thanos.events import Event
from thanos.model.experts import mixtures
from thanos.model.layers import find_blocks
from thanos.recovery.dense_outputs import keep_outputs
from thanos.recovery.distance import Distillation
from thanos.recovery.guard import Guard
from thanos.recovery.isolation import own_state
from thanos.recovery.rate import one_cycle
from thanos.recovery.recipe import RecoveryRecipe
from thanos.recovery.sequences import Sequences
from thanos.recovery.states import RecoveryFolder
from thanos.recovery.watch import Watch
from thanos.system.meter import PhaseMeter

_WEIGHTS = "weights.safetensors"

BETAS, CLIP = (0.9, 0.95), 1.0
"""Decay rates of AdamW's moments, and the largest norm of the gradient. There is no weight decay: it would pull the weights
towards zero, not towards the dense model."""


@dataclass(frozen=True, slots=True)
class Training:
    """The inputs of a training.

    Attributes:
        module: the student with its loss, loaded in float32.
        masks: parameter name in the student → bool mask of the kept weights, on the device.
        ids: token ids of all sequences, (n, T), on the CPU. The first ``recipe.rows`` are for training.
        bos: ids of the tokens with which each sequence begins; empty without any.
        size: root mean square of the non-zero weights of the student's blocks.
        guard: measures the held-out loss.
        recipe: the settings.
        folder: the work folder, which holds the checkpoints.
        device: device of this process.
        world: the processes.
        emit: function that is called with events.
        meter: meter of seconds and memory by phase.
    """

    module: Distillation
    masks: Mapping[str, Tensor]
    ids: Tensor
    bos: tuple[int, ...]
    size: float
    guard: Guard
    recipe: RecoveryRecipe
    folder: RecoveryFolder
    device: torch.device
    world: World
    emit: Callable[[Event], None]
    meter: PhaseMeter

    @property
    def micro_batch(self) -> int:
        """Number of sequences that a process runs at once."""
        return micro_batch(self.recipe, self.device, self.world.size)

    def run(self, resume_from: Path | None) -> str:
        """Train to the end, or until the loss is NaN or infinite.

        Args:
            resume_from: checkpoint of an interrupted training.

        Returns:
            Why the training ended early; empty if it did not.
        """
        if not self.recipe.vary:  # the dense model gets the same text in all epochs
            with self.meter.phase("dense"):
                self._keep_outputs()
        with own_state(self.device):
            watch = Watch(self)
            trainer = _RecoveryTrainer(self, _arguments(self), watch)
            trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
        return watch.ended

    def _keep_outputs(self) -> None:
        """Run the dense decoder once over all sequences."""
        total, length = len(self.ids), self.ids.shape[1]

        def report(done: int) -> None:
            self.emit(Event(kind="progress", phase="dense", done=done, total=total, tokens=done * length))

        self.emit(Event(kind="phase", phase="dense", total=total))
        keep_outputs(self.module, self.ids, self.micro_batch, self.device, self.world, report)


def micro_batch(recipe: RecoveryRecipe, device: torch.device, processes: int) -> int:
    """Return the number of sequences that a process runs at once."""
    return recipe.micro_batch or (recipe.batch // processes if device.type == "cuda" else 1)


def _arguments(training: Training) -> TrainingArguments:
    recipe, cuda = training.recipe, training.device.type == "cuda"
    shard = recipe.shard and training.world.size > 1
    layers = sorted({type(block).__name__ for block in find_blocks(training.module.student)[1]})
    arguments = _Arguments(
        output_dir=str(training.folder.steps),
        per_device_train_batch_size=training.micro_batch,
        gradient_accumulation_steps=recipe.batch // (training.micro_batch * training.world.size),
        max_steps=recipe.steps,
        learning_rate=1.0,  # the callbacks set the rate once the loss before the training is known
        weight_decay=0.0,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        max_grad_norm=CLIP,
        optim="adamw_torch_fused" if cuda else "adamw_torch",
        bf16=cuda,
        use_cpu=not cuda,
        save_strategy="no",  # the callback decides when
        logging_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        logging_nan_inf_filter=False,
        dataloader_pin_memory=cuda,  # with non_blocking: the host does not wait for the copy of a batch
        accelerator_config={"non_blocking": cuda},
        ddp_find_unused_parameters=any(mixtures(training.module.student)),  # an expert may get no token of a batch
        fsdp=shard,  # type: ignore[arg-type]
        fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": layers, "state_dict_type": "SHARDED_STATE_DICT"},
        seed=recipe.seed % 2**32,  # NumPy takes no larger one
    )
    plugin: Any = getattr(arguments, "fsdp_plugin_args", None)  # absent in older releases of transformers
    if plugin is not None:
        # By default the loss would be rounded to bfloat16, and gradients would be summed in it.
        plugin["mixed_precision_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if cuda else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    if arguments.world_size == 1:
        # Without this the Trainer would copy the model to all GPUs of the machine.
        arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


class _Arguments(TrainingArguments):
    """The arguments of the Trainer, with a CPU as device that has no index."""

    @property
    def device(self) -> torch.device:
        """Return the device of this process: ``torch.load`` refuses ``cpu:0``, to which transformers 5.17 loads a state."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device


class _RecoveryTrainer(Trainer):
    """The Trainer with the loss, the schedule and the checkpoints of a recovery, and with masked gradients."""

    def __init__(self, training: Training, arguments: TrainingArguments, watch: Watch) -> None:
        self._training, self._watch = training, watch
        super().__init__(
            model=training.module,
            args=arguments,
            train_dataset=Sequences(training.ids[: training.recipe.rows], training.bos, training.recipe),
            callbacks=[watch],
        )
        self.remove_callback(PrinterCallback)
        watch.trainer = self

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        del args, kwargs
        return model(inputs["ids"], inputs.get("numbers"))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._watch.add(loss)
        if self.accelerator.sync_gradients:  # the last micro-batch of a step
            self._watch.mask_gradients()
        return loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._training.meter.phase("checkpoint"):
            super()._save_checkpoint(*args, **kwargs)

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
            named = self._training.module.named_parameters()
            weights = {name: p.detach().contiguous() for name, p in named if p.requires_grad}
            save_file(weights, Path(output_dir) / _WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        stored = load_file(Path(resume_from_checkpoint) / _WEIGHTS)
        with torch.no_grad():
            for name, parameter in self._training.module.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(stored[name])

    def set_rate(self, rate: float, step: int) -> None:
        """Set the largest learning rate, and the rate of the next step; ``step`` steps are finished."""
        scheduler: Any = self.lr_scheduler
        scheduler.base_lrs = [rate for _ in scheduler.base_lrs]
        for group in scheduler.optimizer.param_groups:
            group["initial_lr"], group["lr"] = rate, rate * one_cycle(step, self._training.recipe.steps)
