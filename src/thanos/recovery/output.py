"""The output of a recovery: the tensors of the best state in the files of the pruned model, and the report."""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass

import torch

from thanos._version import __version__
from thanos.calibration.windows import Calibration
from thanos.checkpoint.writer import CheckpointWriter
from thanos.recovery.guard import HELD_OUT, Guard
from thanos.recovery.pair import Pair, notes_on
from thanos.recovery.recipe import RecoveryRecipe
from thanos.recovery.report import RecoveryReport
from thanos.recovery.states import RecoveryFolder
from thanos.run.auxiliary_files import copy_auxiliary_files
from thanos.run.names import public_name
from thanos.system.meter import PhaseMeter


@dataclass(frozen=True, slots=True)
class Trained:
    """A finished training.

    Attributes:
        pair: the models.
        calibration: the sequences.
        recipe: the settings.
        guard: the held-out losses.
        ended: why the training ended early; empty if it did not.
        notes: remarks for the user.
    """

    pair: Pair
    calibration: Calibration
    recipe: RecoveryRecipe
    guard: Guard
    ended: str
    notes: list[str]


def write_model(result: Trained, work: RecoveryFolder) -> dict[str, int]:
    """Write the model to the work folder: tensors, config, tokenizer. Tensors that were not trained are copied.

    Returns:
        Layer name → number of zeros in the written weight, for the layers with fixed zeros.
    """
    pruned, folder, best = result.pair.pruned, work.model, result.guard.best["step"]
    writer = CheckpointWriter(pruned.checkpoint.layout, pruned.checkpoint, folder)
    if best:
        unwritten = result.guard.unwritten
        if unwritten is None:
            read = work.read_best(best, pruned.checkpoint)
        else:
            read = {pruned.key_of[name]: tensor for name, tensor in unwritten.items()}.__getitem__
        for name, parameter in pruned.meta_model.named_parameters():
            if parameter.requires_grad:
                writer.write(pruned.key_of[name], read(pruned.key_of[name]))
    writer.finish()
    copy_auxiliary_files(pruned, folder)
    recipe = pruned.source.folder / "recipe.toml"
    if recipe.is_file():
        shutil.copyfile(recipe, folder / recipe.name)
    return {layer.name: int((writer.read(pruned.key_of[layer.weight_name]) == 0).sum()) for layer in result.pair.masked}


def make_report(result: Trained, device: torch.device, meter: PhaseMeter, zeros: int) -> RecoveryReport:
    """Return the report.

    Args:
        result: the finished training.
        device: device of the training.
        meter: seconds and memory of the run.
        zeros: number of zeros in the written weights of the layers with fixed zeros.
    """
    import accelerate
    import transformers

    pruned, recipe, guard, phases = result.pair.pruned, result.recipe, result.guard, meter.records()
    early = [f"{result.ended}: the training ended early"] if result.ended else []
    texts = {"calibration": recipe.calibration} | ({"prompts": recipe.prompts} if recipe.prompts else {})
    return RecoveryReport(
        thanos_version=__version__,
        model={
            "name": public_name(pruned.source.name),
            "architecture": type(pruned.meta_model).__name__,
            "parameters": sum(info.numel for info in pruned.checkpoint.tensors.values()),
        },
        dense=public_name(result.pair.dense.source.name),
        recipe=recipe.to_dict() | {name: public_name(value) for name, value in texts.items()},
        calibration=result.calibration.to_dict() | {"source": public_name(result.calibration.source)},
        sequences={
            "trained": recipe.rows,
            "held_out": recipe.samples - recipe.trained + recipe.generated_held_out,
        },
        steps=recipe.steps,
        rate=recipe.largest_rate(guard.history, result.pair.size),
        train=recipe.parts(sparse=result.pair.sparse),
        history=guard.history,
        best_step=guard.best["step"],
        ended=result.ended,
        held_out_before=guard.history[0][HELD_OUT],
        held_out_after=guard.best[HELD_OUT],
        masked_layers=len(result.pair.masked),
        zeros=zeros,
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        },
        phases=phases,
        seconds=sum(record.seconds for record in phases.values()),
        warnings=[*notes_on(pruned, result.pair.dense), *result.notes, *early],
    )
