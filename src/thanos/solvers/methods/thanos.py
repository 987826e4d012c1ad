"""Thanos (arXiv 2504.05346): many weights of a row removed at once, the survivors compensating exactly.

Removing the set P from a row w under ½ δ H δᵀ → min, δ_P = −w_P, gives (the paper's Eq. 10)

    ŵ = w − λ (H⁻¹)_P:,   λ (H⁻¹)_PP = w_P.                                                                   (A)

Column blocks go left to right, H being the trailing matrix H[j1:, j1:]. With H⁻¹ = UᵀU the rows of its inverse that a block
needs are U_bbᵀ U[j1:j2, j1:], so the systems of all rows are sub-blocks of G = U_bbᵀ U_bb and the update of everything to
the right is one matrix product. Columns (structured) are (A) with one P for all rows (the paper's Eq. 13, Algorithm 2):

    Ŵ = W − W_:P ((H⁻¹)_PP)⁻¹ (H⁻¹)_P:.                                                                        (B)
"""

from __future__ import annotations

import torch
from torch import Tensor

from thanos.patterns.columns import Columns
from thanos.patterns.unstructured import Unstructured
from thanos.solvers.masked_cg import RowSolver, solve_rows
from thanos.solvers.masking import clear_
from thanos.solvers.problem import Problem
from thanos.solvers.selection import ResidualMask, column_mask, nm_mask, smallest_mask


def thanos(problem: Problem) -> tuple[Tensor, Tensor]:
    """Prune by Algorithm 1 (unstructured), 8 (n:m) or 2 (columns)."""
    if isinstance(problem.pattern, Columns):
        return _columns(problem)
    rows = RowSolver(peers=problem.peers, hopeful=True)
    found = _by_blocks(problem, rows)
    if not rows.failed():
        return found
    del found  # its memory is needed
    return _by_blocks(problem, RowSolver(peers=problem.peers))


def _by_blocks(problem: Problem, rows: RowSolver) -> tuple[Tensor, Tensor]:
    weight, upper = problem.weight.clone(memory_format=torch.contiguous_format), problem.upper
    removed = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    zeros = problem.some_zeros
    # Counted down on the device, so that no block waits for the host to learn what the one before it took.
    budget = problem.peers.sum_(torch.count_nonzero(problem.zeros)).clamp_min(problem.budget.weights)
    residual = ResidualMask(problem.norms, zeros, budget, problem.peers)
    for start, stop in problem.blocks():
        if isinstance(problem.pattern, Unstructured):
            chosen = residual.take(weight, start, stop)
        else:
            scores = problem.mark_zeros(weight[:, start:stop].abs().mul_(problem.norms[start:stop]), start)
            chosen = nm_mask(scores, problem.nm.n, problem.nm.m)
            chosen = chosen if zeros is None else chosen | zeros[:, start:stop]
        removed[:, start:stop] = chosen
        _remove(weight[:, start:], chosen, upper[start:stop, start:], rows)
    return weight, removed


def _remove(weight: Tensor, chosen: Tensor, upper_rows: Tensor, rows: RowSolver) -> None:
    """Apply (A) to every row: remove ``chosen`` (c, k) from W[:, j1:], its first columns; ``upper_rows`` is U[j1:j2, j1:]."""
    width = chosen.shape[1]
    root, block = upper_rows[:, :width], weight[:, :width]
    inverse_rows = root.T @ upper_rows
    multipliers = rows.solve(inverse_rows[:, :width], block, chosen, root)
    weight.addmm_(multipliers, inverse_rows, alpha=-1)
    clear_(block, chosen)


def _columns(problem: Problem) -> tuple[Tensor, Tensor]:
    weight, upper = problem.weight, problem.upper
    scores = problem.whole.square().sum(0) * problem.norms.square()
    chosen = column_mask(scores, problem.budget.columns, weight.shape[0])
    removed = chosen | problem.zeros
    if not problem.peers.sum_((removed != chosen).sum()):
        index = smallest_mask(scores, problem.budget.columns).nonzero().squeeze(1)
        root = upper[:, index]
        multipliers = _solve_shared(root, weight[:, index])
        update = multipliers @ (root.T @ upper)
    else:  # zeros scattered over columns that stay: every row has its own set
        update = solve_rows(upper.T @ upper, weight, removed, upper, problem.peers) @ (upper.T @ upper)
    return clear_(weight - update, removed), removed


def _solve_shared(root: Tensor, rhs: Tensor) -> Tensor:
    """Return rhs (rootᵀ root)⁻¹, falling back to float64 where float32 does not suffice; root (b, s), rhs (c, s)."""
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
