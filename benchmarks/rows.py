"""Compare ways of solving the rows' small systems: time, and error against float64.

    python benchmarks/rows.py --device cuda --rows 4096 --block-size 128 --json rows.json

The candidates are the masked iteration with one matrix product per step; the solvers' own way, which on a GPU is the same
iteration in one kernel for up to 256 columns; batched Cholesky, padded to the row that loses most weights; and batched Cholesky
of rows grouped by the number of weights that they lose. The Hessians are from many tokens, from few tokens, and with
near-duplicate columns and a damping of 1e-6.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from thanos.bench.measure import machine, median_seconds
from thanos.solvers.hessian import factorize
from thanos.solvers.kernels import solve as kernels
from thanos.solvers.masked_cg import RowSolver
from thanos.solvers.precision import full_float32
from thanos.solvers.synthetic_layer import synthetic_layer

_GROUP = 256
"""Number of rows, with similar numbers of removed weights, that are solved as one batch."""


def padded_cholesky(gram: Tensor, rhs: Tensor, mask: Tensor) -> Tensor:
    """Gather every row's system, padded with the identity to the longest, and factorise them as one batch."""
    return _cholesky(gram, rhs, mask, torch.arange(rhs.shape[0], device=rhs.device)[None])


def grouped_cholesky(gram: Tensor, rhs: Tensor, mask: Tensor) -> Tensor:
    """Like :func:`padded_cholesky`, in groups of rows that lose a similar number of weights, so that little is padded."""
    order = mask.sum(1).argsort()
    return _cholesky(gram, rhs, mask, order.split(_GROUP))


def _cholesky(gram: Tensor, rhs: Tensor, mask: Tensor, groups: Any) -> Tensor:
    solution = torch.zeros_like(rhs)
    for rows in groups:
        part = mask[rows]
        longest = int(part.sum(1).max())
        index = part.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :longest]
        valid = part.gather(1, index)
        for some in torch.arange(len(rows), device=rows.device).split(max(1, (1 << 28) // max(1, longest) ** 2)):
            i, v = index[some], valid[some]
            systems = gram[i[:, :, None], i[:, None, :]] * (v[:, :, None] & v[:, None, :])
            systems.diagonal(dim1=1, dim2=2).add_((~v).to(gram.dtype))
            w = rhs[rows[some]].gather(1, i) * v
            x = torch.cholesky_solve(w[:, :, None], torch.linalg.cholesky_ex(systems).L).squeeze(2)
            solution[rows[some]] = torch.zeros_like(rhs[rows[some]]).scatter_(1, i, x * v)
    return solution


def _stepwise(solver: RowSolver, gram: Tensor, rhs: Tensor, mask: Tensor, root: Tensor) -> Tensor:
    """Run the masked iteration with one matrix product per step at every width."""
    with mock.patch.object(kernels, "WIDEST_SYSTEM", 0):
        return solver.solve(gram, rhs, mask, root)


def exact(gram: Tensor, rhs: Tensor, mask: Tensor) -> Tensor:
    """Solve in float64."""
    return padded_cholesky(gram.double(), rhs.double(), mask)


CASES = {
    "many tokens, damping 0.01": {"tokens": 4, "damping": 0.01, "duplicates": 0.0},
    "few tokens, damping 0.01": {"tokens": 0.1, "damping": 0.01, "duplicates": 0.0},
    "few tokens, damping 1e-6": {"tokens": 0.1, "damping": 1e-6, "duplicates": 0.0},
    "near-duplicates, damping 1e-6": {"tokens": 4, "damping": 1e-6, "duplicates": 1e-3},
}


def measure(rows: int, size: int, device: str, repeats: int) -> list[dict[str, Any]]:
    """Solve the first block of each kind of layer by every candidate."""
    results = []
    for name, case in CASES.items():
        columns = 4 * size
        weight, hessian = synthetic_layer(
            rows, columns, tokens=int(columns * case["tokens"]), device=device, duplicates=case["duplicates"]
        )
        root = factorize(hessian, case["damping"]).upper[:size, :size]
        gram, rhs = root.T @ root, weight[:, :size].contiguous()
        scores = rhs.abs() * hessian.diagonal()[:size].sqrt()
        mask = scores < scores.median()
        reference = exact(root.double().T @ root.double(), rhs, mask)
        solver, stepwise = RowSolver(), RowSolver()
        candidates: dict[str, Callable[[], Tensor]] = {
            "a product a step": lambda s=stepwise, g=gram, w=rhs, m=mask, r=root: _stepwise(s, g, w, m, r),
            "as the solvers do": lambda s=solver, g=gram, w=rhs, m=mask, r=root: s.solve(g, w, m, r),
            "padded Cholesky": lambda g=gram, w=rhs, m=mask: padded_cholesky(g, w, m),
            "grouped Cholesky": lambda g=gram, w=rhs, m=mask: grouped_cholesky(g, w, m),
        }
        for candidate, solve in candidates.items():
            error = (solve().double() - reference).norm() / reference.norm()
            solver.direct = stepwise.direct = 0
            seconds = median_seconds(solve, repeats=repeats, device=device)
            results.append(
                {
                    "case": name,
                    "candidate": candidate,
                    "rows": rows,
                    "block_size": size,
                    "seconds": seconds,
                    "error": error.item(),
                    "condition": torch.linalg.cond(gram.double()).item(),
                    "steps": stepwise.steps,
                    "rows_solved_directly": max(solver.direct, stepwise.direct) // (repeats + 1),
                }
            )
    return results


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, nargs="+", default=[2048])
    parser.add_argument("--block-size", type=int, nargs="+", default=[128])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    results = []
    with torch.inference_mode(), full_float32():
        for rows in arguments.rows:
            for size in arguments.block_size:
                results += measure(rows, size, arguments.device, arguments.repeats)
    arguments.json.write_text(json.dumps({"machine": machine(arguments.device), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
