"""Measure the seconds by phase of a pruning run on 1, 2, 4, … processes, with speed-up and efficiency.

    python benchmarks/distributed.py --processes 1 2 4 --layers 4 --hidden 512              # gloo on the CPU
    python benchmarks/distributed.py --processes 1 2 --device cuda --hidden 4096 --layers 4 # NCCL, one GPU each

The script makes a LLaMA-style checkpoint of random weights and windows of random tokens. Then it runs itself by ``torchrun``
with each number of processes. On the CPU every process has one thread. The weights of all runs are compared with those of the
first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SHARED = ("statistics", "reduce", "solve", "propagate")
"""Phases whose work is divided. The others run on rank 0 only, or in full on every process."""


def emit(line: str) -> None:
    """Write one line to the standard output."""
    sys.stdout.write(line + "\n")


def main() -> None:
    """Run the numbers of processes one after the other and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--pattern", default="unstructured")
    parser.add_argument("--method", default="thanos")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path, default=None, help="write machine, commit, options and seconds here")
    parser.add_argument("--folder", type=Path, default=None, help="work here and keep it (default: a temporary folder)")
    parser.add_argument("--worker", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        worker(options, options.worker)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        make_model(options, folder / "model")
        runs = {size: launch(options, folder, size) for size in options.processes}
        print_table(options, runs)
        compare(options.processes, folder)
        if options.json is not None:
            settings = {name: str(value) for name, value in vars(options).items()}
            options.json.write_text(json.dumps({"options": settings, "runs": runs}, indent=2) + "\n", encoding="utf-8")


def make_model(options: argparse.Namespace, folder: Path) -> None:
    """Save a model of random weights."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    if (folder / "config.json").exists():
        return
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 7 // 2,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.hidden // 64),
        num_key_value_heads=max(1, options.hidden // 256),
        max_position_embeddings=options.sequence_length,
    )
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype)).save_pretrained(folder)


def launch(options: argparse.Namespace, folder: Path, size: int) -> dict[str, Any]:
    """Run torchrun with ``size`` processes; return the phases' seconds."""
    result = folder / f"phases-{size}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), __file__]
    for name in ("device", "layers", "hidden", "samples", "sequence_length", "pattern", "method", "dtype"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "THANOS_BENCH_SIZE": str(size)}
    subprocess.run([*command, "--worker", str(folder)], env=environment, check=True)
    return json.loads(result.read_text())


def worker(options: argparse.Namespace, folder: Path) -> None:
    """Prune in one of the processes; rank 0 writes the seconds."""
    import torch

    import thanos
    from thanos.bench.measure import machine
    from thanos.calibration.windows import Calibration

    size = int(os.environ["THANOS_BENCH_SIZE"])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 1024, (options.samples, options.sequence_length), generator=generator)
    recipe = thanos.Recipe(
        method=options.method,
        pattern=options.pattern,
        samples=options.samples,
        sequence_length=options.sequence_length,
        device=options.device,
        dtype=options.dtype,
        calibration="random",
    )
    windows = Calibration(ids=ids, source="random", rule="packed", seed=0, documents=1)
    report = thanos.prune(folder / "model", folder / f"out-{size}", recipe, overwrite=True, calibration=windows)
    if os.environ.get("RANK", "0") == "0":
        phases = {name: record.seconds for name, record in report.phases.items()}
        facts = {"machine": machine(options.device), "phases": phases}
        (folder / f"phases-{size}.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def print_table(options: argparse.Namespace, runs: dict[int, dict[str, Any]]) -> None:
    """Print seconds, speed-up and efficiency against the first number of processes."""
    first, *_ = runs
    names = list(dict.fromkeys(name for run in runs.values() for name in run["phases"]))
    emit(f"\n{runs[first]['machine']}; {vars(options)}\n")
    emit("| phase | " + " | ".join(f"{size} process{'es'[: 2 * (size > 1)]}" for size in runs) + " |")
    emit("|---|" + "---|" * len(runs))
    rows = [(name, [run["phases"].get(name, 0.0) for run in runs.values()]) for name in names]
    for label, wanted in (("shared work", SHARED), ("total", tuple(names))):
        rows.append((label, [sum(run["phases"].get(name, 0.0) for name in wanted) for run in runs.values()]))
    for label, seconds in rows:
        cells = []
        for size, value in zip(runs, seconds, strict=True):
            gain = seconds[0] / value if value else 0.0
            efficiency = gain * first / size
            cells.append(
                f"{value:.2f} s" if size == first or not gain else f"{value:.2f} s, {gain:.2f} ×, {efficiency:.0%}"
            )
        emit(f"| {label} | " + " | ".join(cells) + " |")


def compare(sizes: list[int], folder: Path) -> None:
    """Print how the weights of the runs differ from the first's."""
    from safetensors.torch import load_file

    expected = load_file(folder / f"out-{sizes[0]}" / "model.safetensors")
    for size in sizes[1:]:
        written = load_file(folder / f"out-{size}" / "model.safetensors")
        masks = sum(int(((written[name] == 0) != (weight == 0)).sum()) for name, weight in expected.items())
        worst = max((written[name] - weight).abs().max().item() for name, weight in expected.items())
        total = sum(weight.numel() for weight in expected.values())
        emit(
            f"\n{size} against {sizes[0]}: {masks} of {total} entries differ in the mask; largest difference {worst:.1e}"
        )


if __name__ == "__main__":
    main()
