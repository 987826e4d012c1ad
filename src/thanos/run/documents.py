"""The documents of a finished output: ``pruning.json``, ``recipe.toml``, ``README.md`` and ``run.json``.

An output may be published. So its documents name no local folder: they state the file name of a local text, and the hash of its
content.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from thanos._version import __version__
from thanos.calibration.windows import Calibration
from thanos.engine.loop import Engine
from thanos.events import RUN_NAME
from thanos.model.stated import stated_facts
from thanos.recipe import Recipe
from thanos.run.model_card import model_card
from thanos.run.names import public_name
from thanos.run.report import PruningReport, compute_totals
from thanos.run.resume import TEXT_HASH, completed_run
from thanos.run.setup import Prepared


def write_documents(
    folder: Path,
    run: Mapping[str, Any],
    plan: Prepared,
    engine: Engine,
    calibration: Calibration,
    recipe: Recipe,
    allocation: Mapping[str, Any] | None = None,
    cut: dict[str, Any] | None = None,
) -> PruningReport:
    """Write the documents of a run whose shards are complete; return the report.

    Args:
        folder: the output folder.
        run: description of the run, see :func:`~thanos.run.resume.describe_run`.
        plan: the opened model and the selection of its layers.
        engine: the engine, after its last block.
        calibration: the windows.
        recipe: the run's recipe.
        allocation: the sparsities that were chosen by layer; None if all layers have the recipe's.
        cut: ``cut`` of the report; None if the pattern removes no units.
    """
    completed = completed_run(run, recipe, folder)
    text_sha256 = completed["text"].get(TEXT_HASH)
    published = public_recipe(recipe)
    report = make_report(plan, engine, calibration, published, text_sha256)
    if cut is not None:
        report.cut.update(cut | ({} if allocation is None else {"split": dict(allocation)}))
    elif allocation is not None:
        report.execution["allocation"] = dict(allocation)
    report.write(folder / "pruning.json")
    (folder / "recipe.toml").write_text(
        _recipe_text(published, text_sha256, calibration.prompts_sha256), encoding="utf-8"
    )
    (folder / "README.md").write_text(model_card(report), encoding="utf-8")
    (folder / RUN_NAME).write_text(json.dumps(completed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def public_recipe(recipe: Recipe) -> Recipe:
    """Return a recipe without local folders."""
    prompts = None if recipe.prompts is None else public_name(recipe.prompts)
    return recipe.replace(calibration=public_name(recipe.calibration), prompts=prompts)


def _recipe_text(recipe: Recipe, text_sha256: str | None, prompts_sha256: str | None) -> str:
    """Return a recipe as TOML. For local texts, a comment says what they are and how to give their paths."""
    found = {"calibration text": ("calibration", text_sha256), "text of the prompts": ("prompts", prompts_sha256)}
    local = {what: (option, sha256) for what, (option, sha256) in found.items() if sha256 is not None}
    facts = [f"# The {what} is local; the SHA-256 of its content is {sha256}.\n" for what, (_, sha256) in local.items()]
    options = "".join(f" --{option} PATH" for option, _ in local.values())
    give = f"# Give {'its path' if len(local) == 1 else 'their paths'}: thanos prune MODEL OUT --recipe recipe.toml{options}\n"
    return "".join([*facts, *([give] if local else []), recipe.to_toml()])


def make_report(
    plan: Prepared, engine: Engine, calibration: Calibration, recipe: Recipe, text_sha256: str | None
) -> PruningReport:
    """Return the report of a run whose blocks are done.

    ``recipe`` is without local folders. ``text_sha256`` is the hash of the calibration text; None if it is not local files.
    """
    import safetensors
    import transformers

    opened, device = plan.opened, engine.inputs.device
    parameters = sum(info.numel for info in opened.checkpoint.tensors.values())
    phases = engine.inputs.meter.records()
    return PruningReport(
        thanos_version=__version__,
        model={
            "name": public_name(opened.source.name) if opened.source.is_local else opened.source.name,
            "origin": "local" if opened.source.is_local else "hub",
            "architecture": type(opened.meta_model).__name__,
            "parameters": parameters,
            "sparsity": plan.sparsity,
            **({"stated": stated} if (stated := stated_facts(opened.source)) else {}),
        },
        recipe=recipe.to_dict(),
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
            "platform": platform.platform(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        },
        calibration=calibration.to_dict() | {"source": recipe.calibration, "text_sha256": text_sha256},
        layers=engine.records,
        dense=plan.dense,
        tuning=engine.tunings,
        totals=compute_totals(
            engine.records,
            parameters=parameters,
            zeros_elsewhere=plan.zeros_elsewhere + sum(tuning.zeros_elsewhere for tuning in engine.tunings),
        ),
        phases=phases,
        seconds=sum(record.seconds for record in phases.values()),
        host_peak_bytes=max((record.host_peak_bytes or 0 for record in phases.values()), default=0),
        device_peak_bytes=max((record.device_peak_bytes or 0 for record in phases.values()), default=0) or None,
        warnings=engine.notes,
        block_errors=engine.block_errors,
        execution={"activations": engine.tier, "batch": engine.inputs.runner.batch},
    )
