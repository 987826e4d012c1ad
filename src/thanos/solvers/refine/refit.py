"""Refit: the best weights for the mask that a method chose, by conjugate gradients (docs/math.md, equation F)."""

from __future__ import annotations

from thanos.patterns.base import Pattern
from thanos.solvers.cost import Cost, Size, support_fit, support_fit_bytes
from thanos.solvers.problem import Problem, Solution
from thanos.solvers.support_cg import fit_support


def refit(problem: Problem, solution: Solution, steps: int) -> Solution:
    """Improve the weights that stay, and keep the mask.

    No row's damped squared error tr((V − W) H (V − W)ᵀ) rises: a row that would not improve keeps its weights.

    Args:
        problem: the problem that ``solution`` solves, with the factor of the damped Hessian.
        solution: the solution of a method or of another refinement.
        steps: largest number of steps; every step is one product of a (c, b) matrix with the Hessian.

    Returns:
        The same mask with better weights, and the residual that is left in each row.
    """
    return fit_support(problem, solution.weight, solution.removed, steps)


def cost(pattern: Pattern, size: Size, steps: int) -> dict[str, Cost]:
    """Return the cost of a refit, by part."""
    del pattern
    return {"refit": support_fit(size, steps)}


def memory(pattern: Pattern, size: Size, steps: int) -> int:
    """Return the bytes that a refit holds in addition to the weight, the masks and the factor."""
    del pattern, steps
    return support_fit_bytes(size)
