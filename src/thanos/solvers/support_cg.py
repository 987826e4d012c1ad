"""The best weights for a given mask: conjugate gradients on the support, for all rows at once.

For a target W, (c, b), with rows w, and the damped Hessian H, (b, b), the best weights ŵ_S of a row with support S satisfy

    ŵ_S H_SS = (w H)_S.                                                                                           (F)

A step is one product of a (c, b) matrix with H; the mask holds the supports. Jacobi's preconditioner divides by H's diagonal.
:mod:`thanos.solvers.masked_cg` solves the small systems of a block; the systems here have up to b unknowns, so no row is solved
directly. The number of steps is limited, the remaining residual is measured, and a row whose objective did not fall keeps the
weights that it had.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thanos.solvers.masking import clear_
from thanos.solvers.problem import Problem, Solution

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Relative residual at which a row counts as converged. Its objective is then above the least by about the residual's square,
times the condition number; in float32 a smaller residual would not change the objective's digits."""

_PATIENCE = 10
"""Steps between two convergence checks; each is a round trip to the device."""


def fit_support(problem: Problem, start: Tensor, removed: Tensor, steps: int) -> Solution:
    """Improve the weights of a mask by at most ``steps`` steps of conjugate gradients.

    Args:
        problem: its ``weight`` is the target W. It must have the factor of the damped Hessian, whose damping is used.
        start: the weights to start from, (c, b), zero at ``removed``.
        removed: mask of the entries that stay zero, (c, b) bool.
        steps: largest number of steps.

    Returns:
        The weights, and the residual of each row. A row's damped squared error tr((V − W) H (V − W)ᵀ) is never above that of
        ``start``.
    """
    system = _System(problem, removed)
    before = system.residual(problem.weight - start)
    size = system.squares(system.residual(problem.weight))
    change = _solve(system, before, size, steps)
    after = before - system.residual(change)  # computed from its definition, not by recurrence
    # f(start) − f(start + E) = E (2R − E H) with R = (W − start) H: without the cancellation of two large numbers.
    better = (change * (before + after)).sum(1, dtype=torch.float64) > 0
    weight = torch.where(better[:, None], start + change, start)
    left = system.squares(torch.where(better[:, None], after, before))
    return Solution(weight, removed, torch.where(size > 0, left / size, 0.0).sqrt())


class _System:
    """The matrix of the rows' systems: X ↦ (X H) ∘ kept, and the norm of a residual in which its diagonal is 1."""

    def __init__(self, problem: Problem, removed: Tensor) -> None:
        assert problem.inputs is not None
        self.problem, self.removed = problem, removed
        self.matrix, self.shift = problem.inputs.matrix, problem.shift
        self.inverse_diagonal = (self.matrix.diagonal() + self.shift).reciprocal()

    def residual(self, rows: Tensor) -> Tensor:
        return clear_(torch.mm(rows, self.matrix).addcmul_(rows, self.shift), self.removed)

    def squares(self, residual: Tensor) -> Tensor:
        return torch.linalg.vecdot(residual * self.inverse_diagonal, residual)

    def waiting(self, squares: Tensor, size: Tensor) -> bool:
        """Return whether a row of any process has not converged: all processes take the same number of steps."""
        unsolved = squares > size * TOLERANCE[squares.dtype] ** 2
        return bool(self.problem.total(unsolved.sum()))


def _solve(system: _System, residual: Tensor, size: Tensor, steps: int) -> Tensor:
    """Return the change E of the weights, zero outside the support, with (E H) ∘ kept close to ``residual``."""
    change, residual = torch.zeros_like(residual), residual.clone()
    direction = residual * system.inverse_diagonal
    squares = torch.linalg.vecdot(direction, residual)
    for step in range(steps):
        if step % _PATIENCE == 0 and not system.waiting(squares, size):
            break
        image = system.residual(direction)
        curvature = torch.linalg.vecdot(direction, image)
        length = torch.where(curvature > 0, squares / curvature, 0.0)[:, None]
        change.addcmul_(length, direction)
        residual.addcmul_(length, image, value=-1)
        scaled = residual * system.inverse_diagonal
        following = torch.linalg.vecdot(scaled, residual)
        turn = torch.where(squares > 0, following / squares, 0.0)[:, None]
        direction = torch.addcmul(scaled, turn, direction)
        squares = following
    return change
