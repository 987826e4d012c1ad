"""Compare a smaller model with its dense parent in one run: bytes, memory, decoding and prefill.

    python benchmarks/shrunk.py DENSE SMALLER [--device cuda] [--rounds 3] [--results FILE]
    python benchmarks/shrunk.py DENSE SMALLER --cut 0.2     first write SMALLER: DENSE without its last neurons
    python benchmarks/shrunk.py DENSE SMALLER --pairs 9     only prefill, on a CPU with other load

Each measurement runs in its own process, so that the resident memory is that of one model. The two models alternate, and
medians are used. The script prints one JSON object: the results of both, the ratio of their speeds, and the inverse ratio of
the bytes that one decoding step reads. The speed does not depend on which units were removed, so ``--cut`` needs no pruning.

With ``--pairs`` both models are in one process and one thread, prefill in turns, and the processor's seconds are counted
instead of the clock's. The script prints the seconds of each model and the ratio of the speeds in each pair.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from thanos.bench.decode import time_decoding
from thanos.bench.measure import machine, synchronize
from thanos.model.layers import find_blocks
from thanos.model.loading import load_model
from thanos.model.opening import open_model
from thanos.model.source import resolve_model
from thanos.shrink.folder import write_smaller
from thanos.shrink.units import NEURONS, units_of

GOAL = 0.9
"""Least ratio of speeds, as a fraction of the inverse ratio of bytes."""


def resident_bytes() -> int:
    """Return the anonymous resident memory of this process, in bytes: the part that no file backs."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(line.split()[1] for line in text.splitlines() if line.startswith("RssAnon")))


@torch.inference_mode()
def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one model, in a process that has loaded no other."""
    device = torch.device(arguments.device)
    source = resolve_model(str(folder))
    open_model(source)  # imports the model's code, which is no part of its memory
    before = resident_bytes()
    model: Any = load_model(source, device=device)
    if device.type == "cpu":
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # otherwise pages of the file, which other processes may share
    held = torch.cuda.memory_allocated() if device.type == "cuda" else resident_bytes() - before
    ids = torch.randint(0, model.config.vocab_size, (1, arguments.prefill), generator=torch.Generator().manual_seed(0))
    ids = ids.to(device)
    seconds = []
    for _ in range(arguments.repeats + 1):
        synchronize(str(device))
        began = time.perf_counter()
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
        synchronize(str(device))
        seconds.append(time.perf_counter() - began)
    del model
    lengths = {"context": arguments.context, "new_tokens": arguments.new_tokens}
    decoding = time_decoding(str(folder), device=device, compiled=arguments.compile, **lengths).models[0]
    return {
        "resident_bytes": held,
        "prefill_tokens_per_second": arguments.prefill / statistics.median(seconds[1:]),
        "tokens_per_second": decoding.tokens_per_second,
        "weight_bytes": decoding.weight_bytes,
        "read_bytes": decoding.read_bytes,
    }


def cut(dense: Path, smaller: Path, share: float, multiple: int) -> None:
    """Write the dense model without its last neurons; the remaining width is a multiple of ``multiple``."""
    opened = open_model(resolve_model(str(dense)))
    prefix, blocks = find_blocks(opened.meta_model)
    kept = {}
    for number, found in enumerate(units_of(opened.meta_model, blocks, NEURONS)):
        for units in found:
            stay = round((1 - share) * len(units) / multiple) * multiple
            kept[f"{prefix}.{number}.{units.writer}"] = torch.arange(stay)
    write_smaller(dense, smaller, kept)


def disk_bytes(folder: Path) -> int:
    """Return the bytes of a folder's weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure both models in turns, each in its own process."""
    folders = {"dense": arguments.dense, "smaller": arguments.smaller}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in folders}
    for _ in range(arguments.rounds):
        for name, folder in folders.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--alone", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    results: dict[str, Any] = {
        name: {"disk_bytes": disk_bytes(folders[name])}
        | {key: statistics.median(run[key] for run in rows) for key in rows[0]}
        for name, rows in runs.items()
    }
    dense, smaller = results["dense"], results["smaller"]
    inverse = dense["read_bytes"] / smaller["read_bytes"]
    ratios = {name: smaller[name] / dense[name] for name in ("tokens_per_second", "prefill_tokens_per_second")} | {
        name: smaller[name] / dense[name] for name in ("disk_bytes", "resident_bytes", "read_bytes")
    }
    speeds = {
        "decoding": ratios["tokens_per_second"] / inverse,
        "prefill": ratios["prefill_tokens_per_second"] / inverse,
    }
    return results | {
        "ratios": ratios,
        "inverse_ratio_of_read_bytes": inverse,
        "speed_against_bytes": speeds,
        "goal_reached": {name: value >= GOAL for name, value in speeds.items()},
        "rounds": {name: [run["tokens_per_second"] for run in rows] for name, rows in runs.items()},
        "prefill_rounds": {name: [run["prefill_tokens_per_second"] for run in rows] for name, rows in runs.items()},
        "settings": {
            name: getattr(arguments, name)
            for name in ("device", "context", "new_tokens", "prefill", "repeats", "compile")
        },
        "machine": machine(arguments.device),
    }


@torch.inference_mode()
def compare_pairs(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare the prefill of both models in pairs, on the CPU, in the processor's seconds of one thread."""
    torch.set_num_threads(1)
    models: dict[str, Any] = {
        name: load_model(resolve_model(str(getattr(arguments, name))), device=torch.device("cpu"))
        for name in ("dense", "smaller")
    }
    size = models["dense"].config.vocab_size
    ids = torch.randint(0, size, (1, arguments.prefill), generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(arguments.pairs + 1):
        for name in sorted(models, reverse=number % 2 == 1):  # each model is first in every other pair
            began = time.process_time()
            models[name](input_ids=ids, use_cache=False, logits_to_keep=1)
            seconds[name].append(time.process_time() - began)
    seconds = {name: values[1:] for name, values in seconds.items()}  # the first pass warms up
    ratios = sorted(before / after for before, after in zip(seconds["dense"], seconds["smaller"], strict=True))
    return {
        "cpu_seconds": seconds,
        "dtype": str(models["dense"].dtype).removeprefix("torch."),
        "prefill": arguments.prefill,
        "ratio_of_speeds": {"median": statistics.median(ratios), "least": ratios[0], "most": ratios[-1]},
        "machine": machine("cpu"),
    }


def main() -> int:
    """Measure, and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path)
    parser.add_argument("smaller", type=Path)
    parser.add_argument("--cut", type=float, help="fraction of the neurons to remove; SMALLER must not exist")
    parser.add_argument("--multiple-of", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="compile the decoding steps by torch.compile")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, help="compare only prefill, in this many pairs of passes")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone is not None:
        print(json.dumps(measure(arguments.alone, arguments)))
        return 0
    if arguments.cut is not None:
        cut(arguments.dense, arguments.smaller, arguments.cut, arguments.multiple_of)
    found = json.dumps((compare_pairs if arguments.pairs else compare)(arguments), indent=2)
    print(found)
    if arguments.results is not None:
        arguments.results.write_text(found + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
