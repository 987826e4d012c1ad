"""Measure the repair of pruned models: perplexity, seconds and memory of a list of cells, on all GPUs of the machine at once.

    python benchmarks/repair.py CELLS.json RESULTS.jsonl --model MODEL --text TEXT --calibration SOURCE

CELLS.json is a list of objects: ``name``; ``recipe``, settings of `thanos.Recipe`; ``recover``, a list of settings of
`thanos recover`, each applied to the pruned model; ``zero_shot``, true if the models of the cell are also measured on the
tasks. There is one process for each GPU. Each takes the next free cell, and appends one line for each measured model. The first
process measures the dense model before its first cell, unless ``--no-dense`` is given. Each line has the commit, the hardware,
the versions and the date.

With ``--share``, recoveries on the same text with the same settings of generated text train on the same generated sequences.
The first of them generates the sequences. The others wait for them. Their lines say ``"shared": true``, and their seconds are
without the generation and without the wait. With ``--reuse``, a cell whose pruned model is in the folder of ``--keep`` is not
pruned again, and gets no line of its own; a model of other settings is refused.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any


def main() -> int:
    """Start a process for each GPU, or one process if there is no GPU; return 1 if a cell failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--model", required=True, help="folder or GGUF file of the dense model")
    parser.add_argument("--text", required=True, help="evaluation text")
    parser.add_argument("--calibration", required=True, help="calibration text of all cells")
    parser.add_argument("--windows", type=int, default=None, help="evaluate the first N windows only")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument(
        "--tasks", default="", help="lm_eval tasks for the dense model and the cells with zero_shot, comma-separated"
    )
    parser.add_argument("--task-folder", default=None, help="folder of local lm_eval tasks")
    parser.add_argument("--commit", default="", help="commit to record, on a machine without the repository")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="start no cell after this number of seconds"
    )
    parser.add_argument("--no-dense", action="store_true", help="do not measure the dense model")
    parser.add_argument("--keep", type=Path, default=None, help="folder for the pruned models; default: none is kept")
    parser.add_argument("--share", type=Path, default=None, help="folder of generated sequences that recoveries share")
    parser.add_argument("--reuse", action="store_true", help="do not prune again what the folder of --keep holds")
    parser.add_argument("--rank", type=int, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.reuse and arguments.keep is None:
        parser.error("--reuse needs --keep, the folder of the pruned models")
    if arguments.rank is not None:
        return work(arguments)
    import torch

    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    claims = Path(tempfile.mkdtemp())
    runs = []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    count = max(1, torch.cuda.device_count())
    for rank in range(count):
        environment = os.environ | {"CLAIMS": str(claims)}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
        if torch.cuda.is_available():
            environment["CUDA_VISIBLE_DEVICES"] = visible[rank]
        runs.append(subprocess.Popen([sys.executable, *sys.argv, "--rank", str(rank)], env=environment))
    return max(run.wait() for run in runs)


def work(arguments: argparse.Namespace) -> int:
    """Measure cells until none is left; return 1 if one failed."""
    from thanos import Recipe

    began, failed = time.monotonic(), 0
    if arguments.rank == 0 and not arguments.no_dense:
        report(arguments, {"name": "dense"} | measured(arguments, arguments.model, tasks=True))
    for number, cell in enumerate(json.loads(arguments.cells.read_text())):
        if time.monotonic() - began > arguments.seconds:
            break
        try:
            (Path(os.environ["CLAIMS"]) / str(number)).touch(exist_ok=False)
        except FileExistsError:
            continue
        try:
            settings = {"samples": arguments.samples, "sequence_length": arguments.sequence_length}
            recipe = Recipe.from_dict(settings | cell["recipe"] | {"calibration": arguments.calibration})
            with tempfile.TemporaryDirectory() as folder:
                run_cell(arguments, cell, recipe, arguments.keep or Path(folder))
        except Exception:
            failed = 1
            report(arguments, {"name": cell["name"], "failed": traceback.format_exc()})
    return failed


def run_cell(arguments: argparse.Namespace, cell: dict[str, Any], recipe: Any, folder: Path) -> None:
    """Prune, recover and measure one cell."""
    from thanos import prune

    out, tasks = folder / cell["name"], cell.get("zero_shot", False)
    finished, began = arguments.reuse and out.exists(), time.monotonic()
    made = prune(arguments.model, out, recipe, overwrite=not finished, resume=finished)
    if not finished:
        row = {"name": cell["name"], "recipe": cell["recipe"]}
        row |= cost(made, began) | measured(arguments, out, tasks=tasks)
        targets = sorted({layer.dense_target for layer in made.layers if layer.dense_target is not None})
        chosen = {str(alpha): sum(layer.dense_target == alpha for layer in made.layers) for alpha in targets}
        kept = [one.kept_epoch for one in made.tuning]
        report(arguments, row | {"layers_by_dense_target": chosen, "kept_epochs": kept})
    for number, settings in enumerate(cell.get("recover", [])):
        from thanos import RecoveryRecipe, recover

        values = {"samples": recipe.samples, "sequence_length": recipe.sequence_length, "seed": recipe.seed}
        training = RecoveryRecipe.from_dict(values | settings | {"calibration": arguments.calibration})
        better, began = folder / f"{cell['name']}-recovered-{number}", time.monotonic()
        with shared_sequences(arguments) as shared:
            trained = recover(out, better, dense=arguments.model, recipe=training, overwrite=True)
        waited = shared.pop("waited", 0.0)
        row = {"name": better.name, "recipe": cell["recipe"], "recover": settings, **shared, **cost(trained, began)}
        row["seconds"] = round(row["seconds"] - waited, 2)
        report(arguments, row | measured(arguments, better, tasks=tasks) | {"history": trained.history})


@contextmanager
def shared_sequences(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """With ``--share``, let recoveries take generated sequences from its folder, or put them there.

    Returns:
        A mapping that gets ``"shared": True`` if they were taken, and the seconds ``waited`` for them.
    """
    from unittest.mock import patch

    from filelock import FileLock
    from safetensors.torch import load_file, save_file

    from thanos.calibration.text import files_sha256
    from thanos.recovery import run
    from thanos.system.files import write_atomically

    generate, said = run.generated_text, dict[str, Any]()

    def shared(dense: Any, calibration: Any, recipe: Any, *more: Any, **how: Any) -> Any:
        prompts = None if recipe.prompts is None else files_sha256(recipe.prompts)
        count = recipe.generate, recipe.generated_held_out
        length = recipe.segment, recipe.prompt, prompts
        text = arguments.commit, arguments.model, calibration.sha256, recipe.trained
        settings = (*text, *count, *length, recipe.seed)
        began = time.monotonic()
        file = arguments.share / f"{sha256(repr(settings).encode()).hexdigest()[:16]}.safetensors"
        with FileLock(f"{file}.lock"):
            if file.exists():
                said.update(shared=True, waited=time.monotonic() - began)
                return load_file(file)["ids"]
            made = generate(dense, calibration, recipe, *more, **how)
            write_atomically(file, lambda path: save_file({"ids": made}, path))
            return made

    if arguments.share is None:
        yield said
        return
    arguments.share.mkdir(parents=True, exist_ok=True)
    with patch.object(run, "generated_text", shared):
        yield said


def measured(arguments: argparse.Namespace, model: str | Path, *, tasks: bool) -> dict[str, Any]:
    """Return the perplexity of a model; with ``tasks`` also its zero-shot accuracies, if tasks were named."""
    from thanos import evaluate

    result: dict[str, Any] = {
        "perplexity": evaluate(model, text=arguments.text, max_windows=arguments.windows, dtype="float32").perplexity
    }
    if tasks and arguments.tasks:
        from thanos import zero_shot

        names = arguments.tasks.split(",")
        try:
            result["zero_shot"] = zero_shot(model, tasks=names, task_folder=arguments.task_folder).to_dict()
        except Exception:  # keep the perplexity if the tasks fail
            result["zero_shot_failed"] = traceback.format_exc()
    return result


def cost(made: Any, began: float) -> dict[str, Any]:
    """Return the seconds of a run, in total and by phase, and its peak device memory in bytes (None without CUDA)."""
    peaks = [phase.device_peak_bytes for phase in made.phases.values() if phase.device_peak_bytes]
    return {
        "seconds": round(time.monotonic() - began, 2),
        "phases": {name: round(phase.seconds, 2) for name, phase in made.phases.items()},
        "peak_device_bytes": max(peaks, default=None),
    }


def report(arguments: argparse.Namespace, row: dict[str, Any]) -> None:
    """Append a line to the results, and print its main fields."""
    import torch
    import transformers

    cuda = torch.cuda.is_available()
    row |= {
        "commit": arguments.commit
        or subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True).strip(),
        "command": " ".join(["python", *(Path(word).name if "/" in word else word for word in sys.argv[:-2])]),
        "hardware": torch.cuda.get_device_name() if cuda else f"{platform.processor()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    with arguments.results.open("a") as file:
        file.write(json.dumps(row) + "\n")
    shown = {key: row[key] for key in ("name", "perplexity", "seconds", "peak_device_bytes", "failed") if key in row}
    print(json.dumps(shown), flush=True)


if __name__ == "__main__":
    sys.exit(main())
