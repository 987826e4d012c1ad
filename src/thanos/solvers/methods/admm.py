"""ADMM (ALPS, arXiv 2406.07831): choose the mask and the weights together; then refit the remaining weights.

The layer's problem is split in two: A minimises the damped output error, Z satisfies the budget and the pattern, and a
multiplier V makes the two agree (docs/math.md). Everything happens in the basis in which the damped Hessian H has a unit
diagonal, so that the nearest Z keeps the entries with the largest magnitude. With K = (H + ρI)⁻¹ an iteration is

    A ← W + (ρ(Z − W) − V) K,    E ← A + V/ρ,    Z ← E on the kept entries,    V ← ρ E on the removed ones.

So E and its mask are the whole state, and an iteration is one product. ρ grows until the mask no longer changes. The weights of
the final mask are then refitted by conjugate gradients (:mod:`thanos.solvers.support_cg`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from thanos.patterns.base import Pattern
from thanos.solvers.cost import Cost, Size, support_fit
from thanos.solvers.masking import without
from thanos.solvers.problem import Problem, Solution
from thanos.solvers.support_cg import fit_support

_PERIOD = 3
"""Iterations with the same ρ. After them ρ grows, which takes another inverse of H + ρI."""

_FIRST_PENALTY = 0.1
"""ρ of the first iterations; H has a unit diagonal."""

_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""Fraction of the kept entries that changed since the last period, and the factor of ρ above that fraction."""

_COLUMN_GROWTH = ((0.1, 1.1), (0.005, 1.07), (0.0, 1.05))
"""The same for whole columns: there are few of them to choose from, and with fast growth the first choice would never
change."""

_RESTART = 5.0
"""Divisor of ρ for a new start, if the mask did not change in the first period: ρ was too large to reach another mask. If
H + ρI is not positive definite, ρ is multiplied by it instead."""

_MOST_RESTARTS = 4
_MOST_PERIODS = 100
"""Bounds of the iteration. Layers of language models need no restart."""

_USUAL_PERIODS = 14
"""Periods that layers of language models need; for the cost model only."""

_REFIT_STEPS = 60
"""Largest number of steps of the refit. It stops earlier once every row has converged."""

_USUAL_REFIT_STEPS = 30
"""Steps of the refit that layers of language models need; for the cost model only."""


def admm(problem: Problem) -> Solution:
    """Prune by ADMM with any pattern, then refit the remaining weights."""
    basis = _UnitBasis(problem)
    target = basis.enter(problem.weight)
    removed = _choose(problem, target)
    # If all entries to remove are zero already, the weight satisfies the pattern as it is.
    if not problem.total((removed & (problem.weight != 0)).sum()):
        return problem.without(removed)
    values, removed = _iterate(problem, basis, target, removed)
    return fit_support(problem, without(basis.leave(values), removed), removed, _REFIT_STEPS)


def _iterate(problem: Problem, basis: _UnitBasis, target: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """Iterate until the mask no longer changes; return E and the mask of its removed entries, each (c, b).

    ``target`` is W in ``basis``; ``first`` is the mask of the entries to remove from it, with which the iteration starts.
    """
    start = penalty = last = _FIRST_PENALTY
    values, removed, moved, restarts = target, first, False, 0
    growth = _COLUMN_GROWTH if problem.pattern.whole_columns else _GROWTH
    for _ in range(_MOST_PERIODS):
        inverse, broken = basis.inverse(penalty)
        before = removed
        for _ in range(_PERIOD):
            values = _step(target, inverse, values, removed, last, penalty)
            removed, last = _choose(problem, values), penalty
        # One round trip; the counts of all processes, so that all continue or stop together.
        counts = torch.stack([(removed != before).sum(), removed.logical_not().sum(), broken.to(torch.int64)])
        changed, kept, failed = problem.total(counts).tolist()
        if failed or (not changed and not moved and restarts < _MOST_RESTARTS):
            restarts = _MOST_RESTARTS if failed else restarts + 1
            start = start * _RESTART if failed else start / _RESTART
            penalty, last, values, removed = start, start, target, first
            continue
        if not changed:
            break
        moved = True
        fraction = changed / 2 / max(1, kept)  # a change is a pair: one entry is removed, another is kept instead
        penalty *= next(factor for least, factor in growth if fraction > least)
    return values, removed


def _step(target: Tensor, inverse: Tensor, values: Tensor, removed: Tensor, last: float, penalty: float) -> Tensor:
    """Return the next E, (c, b), from E and the mask of the iteration before.

    ``target`` is W, ``inverse`` K = (H + penalty·I)⁻¹, ``last`` the ρ of the iteration before, ``penalty`` that of this
    iteration.
    """
    kept = without(values, removed)
    pull = (values - kept).mul_(last / penalty)  # V / ρ
    change = kept.sub_(target).sub_(pull).mul_(penalty)
    return torch.addmm(target, change, inverse).add_(pull)


def _choose(problem: Problem, values: Tensor) -> Tensor:
    """Return the mask of the zeros in the matrix nearest to ``values``, (c, b), that satisfies the pattern.

    The cost of a set of entries is the sum of their squares. Where single entries are compared, magnitudes give the same order.
    """
    single = problem.pattern.any_entries or problem.pattern.group_zeros > 0
    return problem.choose_by(values.abs() if single else values.square())


class _UnitBasis:
    """The basis in which the damped Hessian has a unit diagonal.

    Columns that never had an input are zero in it, so that they are removed first. Those that are not removed keep their
    weights.
    """

    def __init__(self, problem: Problem) -> None:
        assert problem.inputs is not None
        self._weight, self._matrix, self._dead = problem.weight, problem.inputs.matrix, problem.inputs.dead
        self._root = (self._matrix.diagonal() + problem.shift).sqrt()

    def enter(self, weight: Tensor) -> Tensor:
        """Return a weight, (c, b), in this basis."""
        return weight * self._root.masked_fill(self._dead, 0.0)

    def leave(self, values: Tensor) -> Tensor:
        """Return a matrix of this basis, (c, b), as a weight."""
        return torch.where(self._dead, self._weight, values / self._root)

    def inverse(self, penalty: float) -> tuple[Tensor, Tensor]:
        """Return (H + penalty·I)⁻¹, (b, b), and a 0-d integer, not 0 if H + penalty·I is not positive definite."""
        scale = self._root.reciprocal()
        matrix = self._matrix * scale
        matrix *= scale[:, None]
        matrix.diagonal().fill_(1.0 + penalty)
        factor, info = torch.linalg.cholesky_ex(matrix)
        del matrix
        return torch.cholesky_inverse(factor), info


def cost(pattern: Pattern, size: Size) -> dict[str, Cost]:
    """Return the cost of a solve, by part."""
    del pattern
    c, b = float(size.rows), float(size.columns)
    iterations = _PERIOD * _USUAL_PERIODS
    return {
        "inverses": Cost(_USUAL_PERIODS * b**3, _USUAL_PERIODS * 4 * 6 * b**2),
        "iterations": Cost(iterations * 2 * c * b**2, iterations * 4 * 12 * c * b),
        "refit": support_fit(size, _USUAL_REFIT_STEPS),
    }
