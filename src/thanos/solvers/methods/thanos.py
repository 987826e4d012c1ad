"""Thanos (arXiv 2504.05346): remove many weights of a row in one step; the remaining weights compensate exactly.

The matrix is pruned one block of columns at a time, from left to right. In a block, each row loses a set of entries, and the
row's weights from the block's first column on are updated by equation (A) of docs/math.md. The columns pattern instead removes
whole columns from all rows in one step, by equation (B). Whole units, neurons or heads, are removed in several such steps,
ranked by their exact loss (:mod:`thanos.solvers.unit_removal`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from thanos.patterns.base import Pattern
from thanos.solvers.cost import Cost, Size, block_update, removed_columns, scoring
from thanos.solvers.masked_cg import RowSolver
from thanos.solvers.masking import clear_
from thanos.solvers.problem import Problem, Solution
from thanos.solvers.unit_removal import removal_cost, remove_units


def thanos(problem: Problem) -> Solution:
    """Prune by the paper's Algorithm 1 (unstructured), 8 (n:m) or 2 (columns); whole units by greedy removal.

    Other patterns choose the whole mask before the first block.
    """
    if problem.pattern.unit_kinds:
        return remove_units(problem)
    if problem.pattern.whole_columns:
        return _columns(problem)
    # Assume that every row converges, so that no block waits for the host; if one did not, solve all blocks again.
    rows = problem.row_solver(defer_convergence_check=True)
    solution = _by_blocks(problem, rows)
    if not rows.failed():
        return solution
    del solution  # the second solve needs its memory
    return _by_blocks(problem, problem.row_solver())


def _by_blocks(problem: Problem, rows: RowSolver) -> Solution:
    pattern = problem.pattern
    weight, upper = problem.weight.clone(memory_format=torch.contiguous_format), problem.upper
    removed = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    zeros = problem.some_zeros
    residual = problem.residual_mask() if pattern.any_entries else None
    once = not (pattern.any_entries or pattern.group_zeros)
    whole = problem.choose(lambda rows: rows.abs() * problem.norms) if once else None
    for start, stop in problem.blocks():
        if residual is not None:
            chosen = residual.take(weight, start, stop)
        elif whole is not None:
            chosen = whole[:, start:stop]
        else:
            scores = problem.mark_zeros(weight[:, start:stop].abs().mul_(problem.norms[start:stop]), start)
            chosen = pattern.mask(problem, scores)
            chosen = chosen if zeros is None else chosen | zeros[:, start:stop]
        removed[:, start:stop] = chosen
        _remove(weight[:, start:], chosen, upper[start:stop, start:], rows)
    return Solution(weight, removed)


def _remove(weight: Tensor, chosen: Tensor, upper_rows: Tensor, rows: RowSolver) -> None:
    """Apply equation (A) to every row in place.

    ``weight`` is W[:, j1:], the block's k columns and all columns on its right; ``chosen``, (c, k) bool, the mask of the
    entries of the block to remove; ``upper_rows`` is U[j1:j2, j1:]. ``rows`` solves the rows' systems.
    """
    width = chosen.shape[1]
    root, block = upper_rows[:, :width], weight[:, :width]
    inverse_rows = root.T @ upper_rows
    multipliers = rows.solve(inverse_rows[:, :width], block, chosen, root)
    weight.addmm_(multipliers, inverse_rows, alpha=-1)
    clear_(block, chosen)


def _columns(problem: Problem) -> Solution:
    weight, upper = problem.weight, problem.upper
    columns = problem.pattern.mask(problem, problem.column_sums(torch.square) * problem.norms.square())
    removed = columns | problem.zeros
    if not problem.total((removed != columns).sum()):
        index = columns.nonzero().squeeze(1)
        root = upper[:, index]
        multipliers = _solve_shared(root, weight[:, index])
        update = multipliers @ (root.T @ upper)
    else:  # remaining columns hold zeros: every row has its own set of removed entries
        update = problem.row_solver().solve(upper.T @ upper, weight, removed, upper) @ (upper.T @ upper)
    return Solution(clear_(weight - update, removed), removed)


def _solve_shared(root: Tensor, rhs: Tensor) -> Tensor:
    """Return rhs (rootᵀ root)⁻¹ for root (b, s), rhs (c, s); computed in float64 if float32 does not suffice."""
    if root.shape[1] == 0:
        return rhs
    for dtype in dict.fromkeys((root.dtype, torch.float64)):
        matrix = root.to(dtype)
        factor, info = torch.linalg.cholesky_ex(matrix.T @ matrix)
        if info.item() == 0:
            return torch.cholesky_solve(rhs.to(dtype).T, factor).T.to(rhs.dtype)
    # Numerically dependent columns: any of the equivalent solutions is a minimiser.
    exact = root.double()
    return (rhs.double() @ torch.linalg.pinv(exact.T @ exact, hermitian=True)).to(rhs.dtype)


def cost(pattern: Pattern, size: Size) -> dict[str, Cost]:
    """Return the cost of a solve, by part."""
    if pattern.unit_kinds:
        return removal_cost(pattern, size)
    if pattern.whole_columns:
        return {**scoring(pattern, size), **_columns_cost(pattern, size)}
    c, b, block, rest = float(size.rows), float(size.columns), float(size.block), size.rest
    passes = 3 if pattern.any_entries else 0  # histograms, each over all remaining columns
    return {
        "selection": Cost(passes * c * rest, passes * 4 * c * rest + 8 * c * b),
        "rows": Cost(size.steps * 2 * c * block * b + 2 * block**2 * rest, 4 * 4 * c * b),
        "update": block_update(size),
    }


def _columns_cost(pattern: Pattern, size: Size) -> dict[str, Cost]:
    """Return the cost of equation (B), which removes s columns from all rows in one step."""
    c, b, s = float(size.rows), float(size.columns), float(removed_columns(pattern, size))
    return {
        "system": Cost(s**3 / 3 + 2 * s**2 * (b + c), 4 * (b * s + 4 * s**2 + 2 * c * s)),
        "update": Cost(2 * b * s * (b + c), 4 * (b**2 + 3 * b * s + c * s + 4 * c * b)),
    }
