"""Methods that rank the weights once and do not touch the survivors: magnitude and Wanda."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from thanos.patterns.columns import Columns
from thanos.patterns.unstructured import Unstructured
from thanos.solvers.masking import without
from thanos.solvers.problem import Problem
from thanos.solvers.selection import column_mask, even_rows_mask, nm_mask, smallest_mask


def magnitude(problem: Problem) -> tuple[Tensor, Tensor]:
    """Remove the smallest |W| of the layer (Han et al., 2015); columns by their summed |W|."""
    return _prune_by(problem, torch.abs, per_row=False)


def wanda(problem: Problem) -> tuple[Tensor, Tensor]:
    """Remove the smallest |W_ij|·‖X_j‖₂ of each output row (Sun et al., 2023); columns by their summed score."""
    return _prune_by(problem, lambda weight: weight.abs() * problem.norms, per_row=True)


def _prune_by(problem: Problem, score: Callable[[Tensor], Tensor], *, per_row: bool) -> tuple[Tensor, Tensor]:
    pattern = problem.pattern
    if isinstance(pattern, Columns):
        removed = column_mask(score(problem.whole).sum(0), problem.budget.columns, problem.weight.shape[0])
    else:
        scores = problem.mark_zeros(score(problem.weight))
        if not isinstance(pattern, Unstructured):
            removed = nm_mask(scores, pattern.n, pattern.m)
        elif per_row:
            removed = even_rows_mask(scores, problem.budget.weights, problem.peers)
        else:
            removed = smallest_mask(scores, problem.budget.weights, problem.peers)
    removed |= problem.zeros
    return without(problem.weight, removed), removed
