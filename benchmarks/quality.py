"""Make the models of a comparison from one dense model, on all GPUs of the machine at once, and compare them.

    python benchmarks/quality.py MODEL WORK RESULT --text TEXT --calibration SOURCE [--tasks NAMES] [--task-folder FOLDER]

The models are written to WORK, and the page, the figures and ``comparison.json`` of ``thanos compare`` to RESULT. Each chain of
commands in ``CHAINS`` waits for a free GPU, and runs on it. If a command fails, its chain ends, and the models that the chain
has made are compared. RESULT/commands.json has each command with its seconds. A model that is already in WORK is not made
again.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path

MAX = ("--effort", "max")
CHAINS = (
    # (folder, command): the longest chain first
    (
        ("16of32", ("prune", "{model}", "{out}", "--pattern", "16:32", "--method", "admm", *MAX)),
        ("16of32-recovered", ("recover", "{work}/16of32", "{out}", "--dense", "{model}")),
        ("16of32-recovered-packed", ("pack", "{work}/16of32-recovered", "{out}")),
    ),
    (
        ("neurons20", ("prune", "{model}", "{out}", "--pattern", "neurons", "--sparsity", "0.2", *MAX)),
        ("neurons20-recovered", ("recover", "{work}/neurons20", "{out}", "--dense", "{model}")),
    ),
    (
        ("2of4", ("prune", "{model}", "{out}", "--pattern", "2:4", "--method", "admm", *MAX)),
        ("2of4-recovered", ("recover", "{work}/2of4", "{out}", "--dense", "{model}")),
    ),
    (("fast50", ("prune", "{model}", "{out}", "--sparsity", "0.5", "--effort", "fast")),),
)
TRAINS = ("prune", "recover")
"""Commands that get the options of the calibration text."""


def main() -> int:
    """Run the chains, then the comparison; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("work", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--samples", default="128")
    parser.add_argument("--sequence-length", default="2048")
    parser.add_argument("--max-windows", default=None)
    parser.add_argument("--window", default="2048", help="tokens of a window of the evaluation")
    parser.add_argument("--effort", default="max", help="effort of every chain but fast50")
    parser.add_argument("--recover", default="", help="further options of recover, such as '--generate 512 --epochs 3'")
    parser.add_argument("--quantised", default="int8,int4")
    parser.add_argument("--tasks", default=None)
    parser.add_argument("--task-folder", default=None)
    parser.add_argument("--limit", default=None)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="start no command after this number of seconds"
    )
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    arguments.result.mkdir(parents=True, exist_ok=True)
    record = arguments.result / "commands.json"
    lines = json.loads(record.read_text()) if record.exists() else []
    record.write_text(json.dumps(lines + make(arguments), indent=1))
    return compare(arguments)


def make(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Run all chains, each on a free GPU; return what ran."""
    gpus: queue.Queue[str] = queue.Queue()
    for gpu in visible_gpus():
        gpus.put(gpu)
    began, lines = time.monotonic(), []

    def run(chain: tuple[tuple[str, tuple[str, ...]], ...]) -> None:
        gpu = gpus.get()
        for folder, command in chain:
            out = arguments.work / folder
            if out.exists():
                continue
            if time.monotonic() - began > arguments.seconds:
                break
            words = [word.format(model=arguments.model, out=out, work=arguments.work) for word in command]
            words = [arguments.effort if word == "max" else word for word in words]
            words += shlex.split(arguments.recover) if command[0] == "recover" else []
            if command[0] in TRAINS:
                words += ["--calibration", arguments.calibration, "--samples", arguments.samples]
                words += ["--sequence-length", arguments.sequence_length]
            start = time.monotonic()
            code = thanos(words, gpu, arguments.work / f"{folder}.log")
            line = {
                "command": shlex.join(["thanos", *words]),
                "exit": code,
                "seconds": round(time.monotonic() - start, 1),
            }
            print(json.dumps(line), flush=True)
            lines.append(line)
            if code:
                break
        gpus.put(gpu)

    threads = [threading.Thread(target=run, args=(chain,)) for chain in CHAINS]
    for thread in threads:
        thread.start()
        time.sleep(0.1)  # the longest chain gets its GPU first
    for thread in threads:
        thread.join()
    return lines


def compare(arguments: argparse.Namespace) -> int:
    """Compare the dense model, its quantised versions, and all models that were made."""
    names = [folder for chain in CHAINS for folder, _ in chain]
    made = [str(arguments.work / name) for name in names if (arguments.work / name / "config.json").exists()]
    quantised = arguments.quantised
    smaller = str(arguments.work / "neurons20-recovered")
    if smaller in made and quantised:
        quantised += f",{smaller}=int8"
    words = ["compare", arguments.model, *made, "--out", str(arguments.result), "--overwrite", "--text", arguments.text]
    words += ["--sequence-length", arguments.window]
    words += ["--quantised", quantised] if quantised else []
    words += ["--compile"] if arguments.compile else []
    for name in ("max_windows", "tasks", "task_folder", "limit"):
        value = getattr(arguments, name)
        words += [f"--{name.replace('_', '-')}", value] if value else []
    return thanos(words, next(iter(visible_gpus())), None)


def thanos(words: list[str], gpu: str, log: Path | None) -> int:
    """Run a command of thanos on one GPU, or without one if ``gpu`` is empty; return its exit code."""
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
    with (log or Path(os.devnull)).open("w") as file:
        output = file if log else None
        return subprocess.call([sys.executable, "-m", "thanos", *words], env=environment, stdout=output, stderr=output)


def visible_gpus() -> list[str]:
    """Return the numbers of the GPUs of this machine that may be used, or one empty name for a machine without."""
    import torch

    count = torch.cuda.device_count()
    numbers = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    return numbers[:count] or [""]


if __name__ == "__main__":
    sys.exit(main())
