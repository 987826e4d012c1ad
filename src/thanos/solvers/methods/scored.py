"""Methods that score the weights once and do not change the remaining ones: magnitude and Wanda."""

from __future__ import annotations

import torch

from thanos.solvers.problem import Problem, Solution


def magnitude(problem: Problem) -> Solution:
    """Remove the smallest |W_ij| (Han et al., 2015), of the layer by default; whole columns by their sums of |W_ij|."""
    return problem.without(problem.choose(torch.abs))


def wanda(problem: Problem) -> Solution:
    """Remove the smallest |W_ij|·‖X_j‖₂ (Sun et al., 2023), of each output row by default; whole columns by their sums."""
    return problem.without(problem.choose(lambda weight: weight.abs() * problem.norms))
