"""Check that no solver became slower, relative to a plain column-by-column baseline in the same run.

    python benchmarks/guard.py            compare with guard.json; exit 1 if a ratio is more than 1.5 times as large
    python benchmarks/guard.py --store    measure and store the ratios

Ratios of seconds are compared, since a slower machine slows both. Solver and baseline alternate, and the median of the pairs'
ratios is used. A ratio that is too large is measured again before it is reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from baseline import prune_column_by_column
from torch import Tensor

from thanos import prune_weight
from thanos.bench.measure import machine
from thanos.solvers.synthetic_layer import synthetic_layer

STORED = Path(__file__).with_name("guard.json")

ROWS, COLUMNS, TOKENS = 768, 768, 2048
"""Size of the layer: large enough that arithmetic, not Python, takes most of the time; small enough for a check of seconds."""

PAIRS = 5
REGRESSION = 1.5

CASES: dict[str, dict[str, Any]] = {
    "thanos unstructured": {"method": "thanos"},
    "thanos 2:4": {"method": "thanos", "pattern": "2:4"},
    "sparsegpt unstructured": {"method": "sparsegpt"},
    "sparsegpt 2:4": {"method": "sparsegpt", "pattern": "2:4"},
    "wanda unstructured": {"method": "wanda"},
}


def seconds(work: Callable[[], Tensor]) -> float:
    """Time one run."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def ratio(case: dict[str, Any], weight: Tensor, hessian: Tensor) -> float:
    """Return the solver's time over the baseline's: the median over pairs that ran one after the other."""
    groups = (2, 4) if case.get("pattern") == "2:4" else None

    def ours() -> Tensor:
        return prune_weight(weight, hessian, **case).weight

    def baseline() -> Tensor:
        return prune_column_by_column(weight, hessian, groups=groups)

    ours(), baseline()
    return statistics.median(seconds(ours) / seconds(baseline) for _ in range(PAIRS))


def judge(measured: dict[str, float], stored: dict[str, float], again: Callable[[str], float]) -> dict[str, float]:
    """Return the cases whose ratio is too large twice in a row, with the smaller of the two."""
    slow = {}
    for name, value in measured.items():
        if value > REGRESSION * stored[name]:
            value = min(value, again(name))
            if value > REGRESSION * stored[name]:
                slow[name] = value
    return slow


def main() -> int:
    """Measure; store or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", action="store_true", help="store the ratios instead of comparing")
    parser.add_argument("--json", type=Path, help="also write what was measured")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # with more threads, waiting for cores would make the ratio noisy
    weight, hessian = synthetic_layer(ROWS, COLUMNS, tokens=TOKENS, device="cpu")
    measured = {name: ratio(case, weight, hessian) for name, case in CASES.items()}
    report = {"schema": 1, "benchmark": "guard", "machine": machine("cpu"), "ratios": measured}
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    if arguments.store:
        STORED.write_text(json.dumps(report, indent=2) + "\n")
        return 0
    stored = json.loads(STORED.read_text())["ratios"]
    for name, value in measured.items():
        print(f"{name:24} {value:6.3f} of the baseline's time, stored {stored[name]:6.3f}")
    slow = judge(measured, stored, lambda name: ratio(CASES[name], weight, hessian))
    for name, value in slow.items():
        print(f"error: {name} takes {value:.3f} of the baseline's time, stored is {stored[name]:.3f}", file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
