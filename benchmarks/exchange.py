"""Measure whether an exchange of units after the greedy choice lowers a layer's error (docs/math.md, "Removing whole units").

    python benchmarks/exchange.py MODEL --calibration c4-sample.jsonl [--samples 16] [--sequence-length 512] [--results FILE]

Prunes MODEL with ``--effort high`` to a temporary folder. At each layer it measures, in float64 and with the damped Hessian,
the error of the greedy choice in 16 steps, of that in 64 steps, and after an exchange: of all pairs of a removed and a kept
unit the script swaps up to 16 that lower the error most, and repeats this until no pair lowers it. A batch of swaps that raises
the exact error is halved. The script prints one JSON object a layer, with the ratios of the errors to that of 16 steps.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import thanos
from thanos.patterns.units import Units
from thanos.registry import MethodRow, Needs, register_method
from thanos.solvers.problem import Problem, Solution
from thanos.solvers.unit_removal import greedy_units, remove_units

BATCH = 16
"""Swaps that are tried together."""


def error(weight: Tensor, inverse: Tensor, gone: Tensor) -> float:
    """Return the least error without the columns ``gone``, (b,) bool; ``inverse`` is K = H⁻¹, (b, b), the weight W, (c, b)."""
    goes = gone.nonzero().squeeze(1)
    factor = torch.linalg.cholesky(inverse[goes][:, goes])
    return float(torch.linalg.solve_triangular(factor, weight[:, goes].T, upper=False).square().sum())


def swap_changes(weight: Tensor, inverse: Tensor, gone: Tensor) -> Tensor:
    """Return the exact change of the error by each swap, (kept columns, removed columns).

    With P the removed and R the kept columns, M = (K_PP)⁻¹, Z = W_P M and u = −K_RP M, column i of P returns with the
    weights v_i = Z_i / M_ii and lowers the error by ‖Z_i‖² / M_ii. The kept weights V then change by −v_i u_iᵀ, and (H_RR)⁻¹ by
    u_i u_iᵀ / M_ii. So (L) gives the loss of each column of R after that.
    """
    goes, stays = gone.nonzero().squeeze(1), (~gone).nonzero().squeeze(1)
    middle = torch.cholesky_inverse(torch.linalg.cholesky(inverse[goes][:, goes]))
    outer, pull = inverse[stays][:, goes], weight[:, goes] @ middle
    multipliers = -outer @ middle
    kept = weight[:, stays] - pull @ outer.T
    diagonal = inverse.diagonal()[stays] + (multipliers * outer).sum(1)
    scale = middle.diagonal()
    returned = pull / scale
    squares = kept.square().sum(0)[:, None] - 2 * multipliers * (kept.T @ returned)
    squares += multipliers.square() * returned.square().sum(0)
    return squares / (diagonal[:, None] + multipliers.square() / scale) - pull.square().sum(0) / scale


def exchanged(weight: Tensor, inverse: Tensor, gone: Tensor) -> tuple[Tensor, float, int]:
    """Return the mask after the exchange, its error, and the number of swaps; the arguments are those of :func:`error`."""
    best, swaps = error(weight, inverse, gone), 0
    while True:
        changes = swap_changes(weight, inverse, gone)
        pairs: list[tuple[int, int]] = []
        while len(pairs) < min(BATCH, *changes.shape):
            enters, leaves = divmod(int(changes.argmin()), changes.shape[1])
            if float(changes[enters, leaves]) >= -1e-9 * best:
                break
            pairs.append((enters, leaves))
            changes[enters], changes[:, leaves] = float("inf"), float("inf")
        swapped = _swapped(weight, inverse, gone, pairs, best)
        if swapped is None:
            return gone, best, swaps
        gone, best, number = swapped
        swaps += number


def _swapped(
    weight: Tensor, inverse: Tensor, gone: Tensor, pairs: list[tuple[int, int]], best: float
) -> tuple[Tensor, float, int] | None:
    """Return the mask, its error and the number of swaps with the most of these pairs that lower the error; None if none do."""
    goes, stays = gone.nonzero().squeeze(1), (~gone).nonzero().squeeze(1)
    while pairs:
        tried = gone.clone()
        for enters, leaves in pairs:
            tried[stays[enters]], tried[goes[leaves]] = True, False
        found = error(weight, inverse, tried)
        if found < best:
            return tried, found, len(pairs)
        pairs = pairs[: len(pairs) // 2]
    return None


def measure(problem: Problem, gone: Tensor) -> dict[str, Any]:
    """Return the figures of a layer of which the greedy choice removes the columns ``gone``, (b,) bool."""
    assert problem.inputs is not None
    assert isinstance(problem.pattern, Units)
    weight = problem.weight.masked_fill(problem.inputs.dead, 0.0).double()
    hessian = problem.inputs.matrix.double()
    hessian.diagonal().add_(problem.shift.double())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    first = error(weight, inverse, gone)
    members = torch.arange(len(gone))[:, None]
    finer = error(weight, inverse, greedy_units(weight, inverse, members, int(gone.sum()), steps=64))
    _, last, swaps = exchanged(weight, inverse, gone)
    whole = float(((weight @ hessian) * weight).sum())
    return {
        "removed": int(gone.sum()),
        "columns": len(gone),
        "relative_error": first / whole,
        "64_steps": finer / first,
        "exchanged": last / first,
        "swaps": swaps,
    }


def main() -> int:
    """Prune the model and print the figures of each layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    lines: list[str] = []

    def solve(problem: Problem) -> Solution:
        solution = remove_units(problem)
        lines.append(json.dumps({"layer": len(lines)} | measure(problem, solution.removed.all(0))))
        print(lines[-1], flush=True)
        return solution

    register_method(
        MethodRow(
            name="exchange",
            title="Exchange",
            help="as thanos, and measures an exchange of units",
            source=solve,
            needs=Needs.FACTOR,
            compensates=True,
            settings=("damping",),
        )
    )
    recipe = thanos.Recipe(
        method="exchange",
        pattern="neurons",
        sparsity=arguments.sparsity,
        multiple_of=1,
        effort="high",
        dense_target=0.5,
        device="cpu",
        calibration=arguments.calibration,
        samples=arguments.samples,
        sequence_length=arguments.sequence_length,
    )
    with tempfile.TemporaryDirectory() as folder:
        thanos.prune(arguments.model, Path(folder) / "out", recipe)
    if arguments.results is not None:
        arguments.results.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
