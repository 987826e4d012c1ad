"""SparseGPT (Frantar and Alistarh, 2023): one column after the other, errors carried to the right.

With H⁻¹ = UᵀU, removing W_ij and compensating in the columns to its right only changes row i by

    W[i, j:] −= (W_ij / U_jj) · U[j, j:],

at the cost W_ij² / U_jj², by which, or by its root, weights are ranked. Columns are taken in panels inside blocks inside the
matrix, so that most of the arithmetic is matrix products; on a GPU a panel is one kernel, which keeps a tile of rows in
registers. The result is that of the column-by-column recursion up to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thanos.patterns import NM, Columns, Unstructured
from thanos.solvers import kernels
from thanos.solvers.base import Problem, column_mask
from thanos.solvers.select import KernelSearch, nm_mask, smallest_mask

_PANEL = 16
"""Columns whose updates go to one another directly; wider panels do more work column by column."""


def sparsegpt(problem: Problem) -> tuple[Tensor, Tensor]:
    """Prune by the recursion above; the mask of a block is chosen when the block (for n:m: the group) is reached."""
    weight, upper = problem.weight.clone(memory_format=torch.contiguous_format), problem.upper
    removed = problem.zeros.clone()
    if isinstance(problem.pattern, Columns):
        scores = _scores(problem, problem.whole, 0).square_().sum(0)
        removed |= column_mask(scores, problem.budget.columns, weight.shape[0])
    counts = _block_budgets(problem) if isinstance(problem.pattern, Unstructured) else {}
    search = KernelSearch(problem.peers)
    for start, stop in problem.blocks():
        if counts:
            removed[:, start:stop] = _block_mask(problem, weight[:, start:stop], start, counts[start], search)
        errors = _eliminate_block(problem, weight[:, start:stop], removed[:, start:stop], start)
        if stop < weight.shape[1]:
            weight[:, stop:].addmm_(errors, upper[start:stop, stop:], alpha=-1)
    return weight.masked_fill_(removed, 0.0), removed


def _scores(problem: Problem, weight: Tensor, start: int) -> Tensor:
    """Return |W_ij| / U_jj for columns from ``start`` on; 0 where the input was always zero."""
    return (weight * _reciprocals(problem)[start : start + weight.shape[1]]).abs_()


def _block_mask(problem: Problem, weight: Tensor, start: int, count: int, search: KernelSearch) -> Tensor:
    """Return the ``count`` entries of a block, over all processes, that cost least."""
    if kernels.usable(weight):
        stop = start + weight.shape[1]
        zeros = None if problem.some_zeros is None else problem.some_zeros[:, start:stop]
        wanted = torch.full((), count, dtype=torch.int64, device=weight.device)
        return search.smallest(weight, _reciprocals(problem)[start:stop], zeros, wanted)
    scores = problem.mark_zeros(_scores(problem, weight, start), start)
    return smallest_mask(scores, count, problem.peers)


def _reciprocals(problem: Problem) -> Tensor:
    """Return 1 / U_jj, 0 where the input was always zero: |W_ij| / U_jj ranks as its square does."""
    assert problem.inputs is not None
    return problem.upper.diagonal().reciprocal().masked_fill_(problem.inputs.dead, 0.0)


def _block_budgets(problem: Problem) -> dict[int, int]:
    """Return how many entries each block gives, by its first column, so that the matrix ends on its budget exactly.

    The running total follows the share of columns passed, except that zeros already there, in the block and further right,
    have the first claim: a block gives at least its own zeros, which score below everything else.
    """
    columns = problem.weight.shape[1]
    tally = torch.cat([problem.zeros.sum(0), problem.zeros.new_full((1,), problem.weight.shape[0], dtype=torch.int64)])
    *zeros, rows = problem.peers.sum_(tally).tolist()
    total = max(problem.budget.weights, sum(zeros))
    counts, spent = {}, 0
    for start, stop in problem.blocks():
        target = total * stop // columns - spent
        # What this block leaves must fit into the columns to its right.
        target = max(target, total - spent - rows * (columns - stop))
        counts[start] = max(min(target, total - spent - sum(zeros[stop:])), sum(zeros[start:stop]))
        spent += counts[start]
    return counts


def _eliminate_block(problem: Problem, weight: Tensor, removed: Tensor, offset: int) -> Tensor:
    """Run the recursion on one block in place; return the errors W_ij / U_jj of what was removed, (c, k).

    ``weight`` and ``removed`` are views of the block's columns; for n:m ``removed`` is filled in on the way.
    """
    width, group = weight.shape[1], problem.pattern.group
    upper = problem.upper[offset : offset + width, offset : offset + width]
    errors = torch.empty_like(weight, memory_format=torch.contiguous_format)
    fused = kernels.usable(weight) and group <= kernels.WIDEST_PANEL
    eliminate = _eliminate_panel_fused if fused else _eliminate_panel
    panel = (kernels.WIDEST_PANEL if fused else max(group, _PANEL)) // group * group
    for start in range(0, width, panel):
        stop = min(start + panel, width)
        errors[:, start:stop] = eliminate(
            problem, weight[:, start:stop], removed[:, start:stop], upper[start:stop, start:stop], offset + start
        )
        if stop < width:
            weight[:, stop:].addmm_(errors[:, start:stop], upper[start:stop, stop:], alpha=-1)
    return errors


def _eliminate_panel_fused(problem: Problem, weight: Tensor, removed: Tensor, upper: Tensor, offset: int) -> Tensor:
    """The same for one panel, every row's recursion within one kernel."""
    assert problem.inputs is not None
    errors = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    columns = slice(offset, offset + weight.shape[1])
    n, m = (problem.pattern.n, problem.pattern.m) if isinstance(problem.pattern, NM) else (0, 0)
    dead, zeros = problem.inputs.dead[columns], problem.zeros[:, columns]
    kernels.eliminate(weight, removed, zeros, upper.contiguous(), dead, errors, n, m)
    return errors


def _eliminate_panel(problem: Problem, weight: Tensor, removed: Tensor, upper: Tensor, offset: int) -> Tensor:
    """The same column by column. Works on the transpose, so that a column is one stretch of memory."""
    lines, gone = weight.T.contiguous(), removed.T.contiguous()
    errors = torch.empty_like(lines)
    reciprocal = upper.diagonal().reciprocal()
    for j in range(lines.shape[0]):
        if isinstance(problem.pattern, NM) and j % problem.pattern.m == 0:
            group = slice(j, j + problem.pattern.m)
            gone[group] |= _choose_group(problem, lines[group].T, offset + j).T
        torch.mul(lines[j], gone[j], out=errors[j]).mul_(reciprocal[j])
        lines[j:].addr_(upper[j, j:], errors[j], alpha=-1)
    weight.copy_(lines.T)
    removed.copy_(gone.T)
    return errors.T


def _choose_group(problem: Problem, weight: Tensor, start: int) -> Tensor:
    """Decide the n:m group that begins at column ``start``, on its weights (c, m) as they are now."""
    scores = problem.mark_zeros(_scores(problem, weight, start), start)
    return nm_mask(scores, problem.nm.n, problem.nm.m)
