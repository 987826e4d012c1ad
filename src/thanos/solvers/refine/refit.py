"""Refit: the best weights for the mask that a method chose, by conjugate gradients (docs/math.md, equation F)."""

from __future__ import annotations

from thanos.solvers.problem import Problem, Solution
from thanos.solvers.support_cg import fit_support


def refit(problem: Problem, solution: Solution, steps: int) -> Solution:
    """Improve the remaining weights, and keep the mask.

    No row's damped squared error tr((V − W) H (V − W)ᵀ) rises: a row that would not improve keeps its weights.

    Args:
        problem: the problem that ``solution`` solves, with the factor of the damped Hessian.
        solution: the solution of a method or of another refinement.
        steps: largest number of steps; every step is one product of a (c, b) matrix with the Hessian.

    Returns:
        The same mask with better weights, and the residual that is left in each row.
    """
    return fit_support(problem, solution.weight, solution.removed, steps)
