"""Measure the processor time of one layer on the CPU, by this package and by the SparseGPT reference, and of the common parts.

    python benchmarks/processor.py --peer sparsegpt-folder --json processor.json

The processor time of one thread is measured, and not elapsed time, so that other programs disturb it less. They still share the
caches and the memory, so the load is recorded too. The smallest of ``--repeats`` runs is used.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import thanos.solvers.prune_layer as solvers
from thanos.bench.measure import machine
from thanos.bench.references import load_reference
from thanos.recipe import LayerRecipe
from thanos.solvers.hessian import InputStatistics
from thanos.solvers.synthetic_layer import synthetic_layer


def least(work: Callable[[], Any], repeats: int) -> float:
    """Return the least processor time of so many runs after a warm-up."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return min(seconds[1:])


def without_errors(weight: torch.Tensor, hessian: torch.Tensor, recipe: LayerRecipe) -> None:
    """Prune as ever, but measure no error: what the references do."""
    with mock.patch.object(solvers, "squared_output_norms", lambda delta, inputs: delta.new_ones(len(delta)).double()):
        solvers.prune_layer(weight, InputStatistics(hessian), recipe)


def main() -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer", type=Path, required=True, help="the SparseGPT repository")
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    weight, hessian = synthetic_layer(given.size, given.size, tokens=given.tokens, device="cpu")
    reference, before, seconds = load_reference("sparsegpt", given.peer), os.getloadavg()[0], {}
    inputs = InputStatistics(hessian)
    square = torch.randn(given.size, given.size)
    work: dict[str, Callable[[], Any]] = {
        "a square product": lambda: square @ square,
        "factor": lambda: InputStatistics(hessian).factor(0.01),
        "one error": lambda: solvers.squared_output_norms(weight, inputs),
    }
    for pattern in ("unstructured", "2:4"):
        ours = {m: LayerRecipe(method=m, pattern=pattern) for m in ("sparsegpt", "thanos")}
        work[f"reference sparsegpt {pattern}"] = lambda r=ours["sparsegpt"]: reference(weight, hessian, r)
        for method, recipe in ours.items():
            name = f"{method} {pattern}, B = {recipe.resolved_block_size}"
            work[name] = lambda r=recipe: solvers.prune_layer(weight, InputStatistics(hessian), r)
            work[f"{name}, no errors"] = lambda r=recipe: without_errors(weight, hessian, r)
    for name, function in work.items():
        seconds[name] = least(function, given.repeats)
    report = {
        "schema": 1,
        "benchmark": "processor",
        "machine": machine("cpu") | {"load_average": [before, os.getloadavg()[0]]},
        "settings": {"size": given.size, "tokens": given.tokens, "repeats": given.repeats},
        "seconds": seconds,
    }
    given.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
