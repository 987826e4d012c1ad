"""Greedy removal of whole units of columns by their exact loss; the remaining columns are fitted exactly (docs/math.md).

W is the weight to fit to, (c, b), H the damped Hessian, (b, b), and K = H⁻¹. If the unit with the columns P is removed and all
other columns compensate, the error rises by

    loss(P) = tr(W_:P (K_PP)⁻¹ W_:Pᵀ).                                                                             (L)

Each step removes a part of the budget: the units with the least loss, all at once. Then W and K are updated to the remaining
columns:

    W ← W − W_:P (K_PP)⁻¹ K_P:,    K ← K − K_:P (K_PP)⁻¹ K_P:.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thanos.patterns.base import Pattern
from thanos.patterns.units import Units
from thanos.solvers.cost import Cost, Size, removed_columns
from thanos.solvers.problem import Problem, Solution
from thanos.solvers.support_cg import fit_support

STEPS = 16
"""Number of parts in which the budget is removed."""

_ZERO_STEPS = 60
"""Steps of conjugate gradients for a weight that has zeros outside the removed units, which stay zero."""


def remove_units(problem: Problem) -> Solution:
    """Remove the budget's units greedily, and give the remaining columns their best weights."""
    pattern, columns = problem.pattern, problem.weight.shape[1]
    assert isinstance(pattern, Units)
    assert problem.inputs is not None
    groups, _, run = pattern.layout(columns)
    numbers = torch.arange(columns, device=problem.weight.device)
    every = problem.weight if problem.all_rows is None else problem.all_rows
    units = greedy_units(
        every.masked_fill(problem.inputs.dead, 0.0),  # no weight matters in a column that never had an input
        problem.upper.T @ problem.upper,
        pattern.members(numbers),
        problem.budget.columns // (groups * run),
    )
    gone = pattern.columns_of(units, columns)
    return fit_columns(problem, gone)


def greedy_units(weight: Tensor, inverse: Tensor, members: Tensor, number: int, steps: int = STEPS) -> Tensor:
    """Choose ``number`` units, fewer than all, by their loss, in ``steps`` parts; return their mask, (units,) bool.

    ``weight`` is W, (c, b), of all rows; ``inverse`` K, (b, b); ``members`` the columns of each unit, (units, k) int64.
    """
    width, gone = members.shape[1], torch.zeros(len(members), dtype=torch.bool, device=members.device)
    order, left = members.reshape(-1), torch.arange(len(members), device=members.device)
    weight, inverse = weight[:, order], inverse[order][:, order]
    done = 0
    for step in range(1, steps + 1):
        count = number * step // steps - done
        if not count:
            continue
        done += count
        # A stable sort: among equal losses the first unit is removed.
        least = unit_losses(weight, inverse, width).argsort(stable=True)[:count]
        gone[left[least]] = True
        if done < number:
            stays = torch.ones(len(left), dtype=torch.bool, device=left.device).index_fill_(0, least, False)
            weight, inverse = without_columns(weight, inverse, stays.repeat_interleave(width))
            left = left[stays]
    return gone


def unit_losses(weight: Tensor, inverse: Tensor, width: int) -> Tensor:
    """Return the loss of each unit, (units,); a unit has ``width`` consecutive columns. See (L)."""
    if width == 1:
        return weight.square().sum(0) / inverse.diagonal()
    count = len(inverse) // width
    blocks = inverse.view(count, width, count, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    right = weight.view(-1, count, width).permute(1, 2, 0)
    factor, right = _cholesky(blocks, right)
    return torch.linalg.solve_triangular(factor, right, upper=False).square().sum((1, 2)).to(weight.dtype)


def without_columns(weight: Tensor, inverse: Tensor, stays: Tensor) -> tuple[Tensor, Tensor]:
    """Return W and K of the columns ``stays``, (b,) bool, after the others are removed and these have compensated."""
    gone, stays = (~stays).nonzero().squeeze(1), stays.nonzero().squeeze(1)
    rows = inverse[gone]
    factor, both = _cholesky(rows[:, gone], torch.cat([weight[:, gone].T, rows[:, stays]], dim=1))
    solved = torch.cholesky_solve(both, factor).to(weight.dtype)
    multipliers, image = solved[:, : len(weight)], solved[:, len(weight) :]
    kept = rows[:, stays]
    weight = weight[:, stays].addmm_(multipliers.T, kept, alpha=-1)
    return weight, inverse[stays][:, stays].addmm_(kept.T, image, alpha=-1)


def fit_columns(problem: Problem, gone: Tensor) -> Solution:
    """Remove the columns ``gone``, (b,) bool, and give the other columns the weights of the least damped error.

    For the remaining columns S and the removed columns P, Ŵ_:S = (W H)_:S (H_SS)⁻¹ = W_:S + W_:P H_PS (H_SS)⁻¹.
    """
    assert problem.inputs is not None
    weight, matrix = problem.weight, problem.inputs.matrix
    stays, goes = (~gone).nonzero().squeeze(1), gone.nonzero().squeeze(1)
    system = matrix[stays][:, stays]
    system.diagonal().add_(problem.shift[stays])
    right = matrix[stays][:, goes] @ weight[:, goes].T
    factor, exact = _cholesky(system, right)
    change = torch.cholesky_solve(exact, factor)
    # One step of refinement: the residual of a solve in float32 is larger than its rounding.
    change += torch.cholesky_solve(exact - system.to(change.dtype) @ change, factor)
    fitted = torch.zeros_like(weight)
    fitted[:, stays] = weight[:, stays] + change.T.to(weight.dtype)
    removed = gone.expand_as(weight)
    if problem.some_zeros is None:
        return Solution(fitted, removed.clone())
    removed = removed | problem.zeros
    return fit_support(problem, fitted.masked_fill_(removed, 0.0), removed, _ZERO_STEPS)


def _cholesky(matrix: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lower factor of a positive definite matrix, (..., n, n), and ``right``, both in float64 if float32 fails."""
    for dtype in dict.fromkeys((matrix.dtype, torch.float64)):
        factor, info = torch.linalg.cholesky_ex(matrix.to(dtype))
        if not bool(info.any()):
            return factor, right.to(dtype)
    # The damped Hessian is positive definite. If rounding in K has made the matrix indefinite, raise the diagonal by more than
    # that rounding.
    raised = matrix.double().clone()
    raised.diagonal(dim1=-2, dim2=-1).mul_(1 + 1e-6)
    return torch.linalg.cholesky(raised), right.double()


def removal_cost(pattern: Pattern, size: Size) -> dict[str, Cost]:
    """Return the cost of :func:`remove_units`, by part, without the losses of the units, which cost little."""
    c, b, s = float(size.rows), float(size.columns), float(removed_columns(pattern, size))
    r, t = s / STEPS, b - s
    widths = [b - step * r for step in range(STEPS - 1)]  # nothing is updated after the last step
    flops = sum(r**3 / 3 + 2 * r * m * (c + m - r) for m in widths)
    return {
        "inverse": Cost(2 * b**3, 8 * b**2),
        "removal": Cost(flops, sum(4 * 3 * m * (c + m) for m in widths)),
        "fit": Cost(t**3 / 3 + 2 * c * t * (s + 3 * t), 4 * (3 * t**2 + t * s + 8 * c * b)),
    }
