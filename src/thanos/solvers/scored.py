"""Methods that rank the weights once and do not touch the survivors: magnitude and Wanda."""

from __future__ import annotations

from torch import Tensor

from thanos.patterns import Columns, Unstructured
from thanos.solvers.base import Problem, column_mask, without
from thanos.solvers.select import even_rows_mask, nm_mask, smallest_mask


def magnitude(problem: Problem) -> tuple[Tensor, Tensor]:
    """Remove the smallest |W| of the layer (Han et al., 2015); columns by their summed |W|."""
    return _prune_by(problem, problem.weight.abs(), per_row=False)


def wanda(problem: Problem) -> tuple[Tensor, Tensor]:
    """Remove the smallest |W_ij|·‖X_j‖₂ of each output row (Sun et al., 2023); columns by their summed score."""
    return _prune_by(problem, problem.weight.abs() * problem.norms, per_row=True)


def _prune_by(problem: Problem, scores: Tensor, *, per_row: bool) -> tuple[Tensor, Tensor]:
    pattern = problem.pattern
    if isinstance(pattern, Columns):
        removed = column_mask(scores.sum(0), problem.budget.columns, scores.shape[0])
    else:
        problem.mark_zeros(scores)
        if not isinstance(pattern, Unstructured):
            removed = nm_mask(scores, pattern.n, pattern.m)
        elif per_row:
            removed = even_rows_mask(scores, problem.budget.weights, problem.peers)
        else:
            removed = smallest_mask(scores, problem.budget.weights, problem.peers)
    removed |= problem.zeros
    return without(problem.weight, removed), removed
