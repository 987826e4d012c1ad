"""Measure the processor time of pruning one layer on the CPU, by this package and by the SparseGPT reference.

    python benchmarks/processor.py --peer sparsegpt-folder --json processor.json

Single parts of the work are also measured: a product, the factor and one error.

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

from thanos.bench.measure import machine
from thanos.bench.references import load_reference
from thanos.recipe import LayerRecipe
from thanos.solvers import layer_solve
from thanos.solvers.hessian import InputStatistics
from thanos.solvers.layer_error import squared_output_norms
from thanos.solvers.prune_layer import prune_layer
from thanos.solvers.synthetic_layer import synthetic_layer


def least(work: Callable[[], Any], repeats: int) -> float:
    """Return the least processor time of ``repeats`` runs, after a warm-up, in seconds."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return min(seconds[1:])


def without_errors(weight: torch.Tensor, hessian: torch.Tensor, recipe: LayerRecipe) -> None:
    """Prune as usual, but measure no error, as the references do."""

    def ones(delta: torch.Tensor, inputs: InputStatistics) -> torch.Tensor:
        return delta.new_ones(len(delta)).double()

    with mock.patch.object(layer_solve, "squared_output_norms", ones):
        prune_layer(weight, InputStatistics(hessian), recipe)


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer", type=Path, required=True, help="the SparseGPT repository")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    weight, hessian = synthetic_layer(arguments.size, arguments.size, tokens=arguments.tokens, device="cpu")
    reference, before, seconds = load_reference("sparsegpt", arguments.peer), os.getloadavg()[0], {}
    inputs = InputStatistics(hessian)
    square = torch.randn(arguments.size, arguments.size)
    work: dict[str, Callable[[], Any]] = {
        "a square product": lambda: square @ square,
        "factor": lambda: InputStatistics(hessian).factor(0.01),
        "one error": lambda: squared_output_norms(weight, inputs),
    }
    for pattern in ("unstructured", "2:4"):
        ours = {m: LayerRecipe(method=m, pattern=pattern) for m in ("sparsegpt", "thanos")}
        work[f"reference sparsegpt {pattern}"] = lambda r=ours["sparsegpt"]: reference(weight, hessian, r)
        for method, recipe in ours.items():
            name = f"{method} {pattern}, B = {recipe.resolved_block_size}"
            work[name] = lambda r=recipe: prune_layer(weight, InputStatistics(hessian), r)
            work[f"{name}, no errors"] = lambda r=recipe: without_errors(weight, hessian, r)
    for name, function in work.items():
        seconds[name] = least(function, arguments.repeats)
    report = {
        "schema": 1,
        "benchmark": "processor",
        "machine": machine("cpu") | {"load_average": [before, os.getloadavg()[0]]},
        "settings": {"size": arguments.size, "tokens": arguments.tokens, "repeats": arguments.repeats},
        "seconds": seconds,
    }
    arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
