"""SparseGPT (Frantar and Alistarh, 2023): prune one column after the other; the columns on its right compensate.

The recursion is equation (C) of docs/math.md. The matrix is split into blocks of columns, and a block into panels, so that
most of the arithmetic is matrix products. On a GPU one kernel prunes a panel and keeps a tile of rows in registers. Up to
rounding, the result equals that of the column-by-column recursion.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from thanos.patterns.base import Pattern
from thanos.solvers.cost import Cost, Size, block_update, scoring
from thanos.solvers.kernels import solve as kernels
from thanos.solvers.masking import clear_
from thanos.solvers.problem import Problem, Solution
from thanos.solvers.row_selection import group_mask, smallest_of_rows
from thanos.solvers.selection import KernelSearch

_PANEL = 16
"""Columns of a panel, which are updated column by column. A wider panel leaves less work to matrix products."""


def sparsegpt(problem: Problem) -> Solution:
    """Prune by the recursion.

    Unstructured pruning chooses the mask of a block when it reaches the block; n:m that of a group when it reaches the group.
    Other patterns choose the whole mask before the first column.
    """
    pattern = problem.pattern
    weight, upper = problem.weight.clone(memory_format=torch.contiguous_format), problem.upper
    if pattern.any_entries or pattern.group_zeros:
        removed = problem.zeros.clone()
    else:
        removed = problem.choose(lambda rows: _scores(problem, rows, 0).square_())
    counts = _block_budgets(problem) if pattern.any_entries else {}
    search = problem.kernel_search()
    for start, stop in problem.blocks():
        if counts:
            removed[:, start:stop] = _block_mask(problem, weight[:, start:stop], start, counts[start], search)
        errors = _eliminate_block(problem, weight[:, start:stop], removed[:, start:stop], start)
        if stop < weight.shape[1]:
            weight[:, stop:].addmm_(errors, upper[start:stop, stop:], alpha=-1)
    return Solution(clear_(weight, removed), removed)


def _scores(problem: Problem, weight: Tensor, start: int) -> Tensor:
    """Return |W_ij| / U_jj for the columns ``weight``, which begin at ``start``; 0 where the input was always zero."""
    return (weight * _reciprocals(problem)[start : start + weight.shape[1]]).abs_()


def _block_mask(problem: Problem, weight: Tensor, start: int, count: Tensor, search: KernelSearch) -> Tensor:
    """Return the mask, (c, k) bool, of the entries of a block with the least cost: ``count`` of them.

    ``count`` is a number for all rows of all processes, (1,) on the CPU, or one for each row, (c,).
    """
    stop = start + weight.shape[1]
    zeros = None if problem.some_zeros is None else problem.some_zeros[:, start:stop]
    if problem.by_row:
        return smallest_of_rows(weight, _reciprocals(problem)[start:stop], zeros, count, stop - start)
    if kernels.usable(weight):
        wanted = torch.full((), int(count), dtype=torch.int64, device=weight.device)
        return search.smallest(weight, _reciprocals(problem)[start:stop], zeros, wanted)
    scores = problem.mark_zeros(_scores(problem, weight, start), start)
    return problem.smallest(scores, int(count))


def _reciprocals(problem: Problem) -> Tensor:
    """Return 1 / U_jj, (b,); 0 where the input was always zero. |W_ij| / U_jj gives the same order as its square, the cost."""
    assert problem.inputs is not None
    return problem.upper.diagonal().reciprocal().masked_fill_(problem.inputs.dead, 0.0)


def _block_budgets(problem: Problem) -> dict[int, Tensor]:
    """Return the number of entries to remove from each block, by the block's first column; see :func:`_block_mask`.

    The numbers of all blocks add up to the budget: of all rows, or of each row by its scores before the first block.
    """
    columns = problem.weight.shape[1]
    if problem.by_row:
        budgets = problem.row_budgets(problem.mark_zeros(_scores(problem, problem.weight, 0)))
        return _split(budgets, problem.zeros, 1, problem.blocks())
    # The zeros of each column and the number of rows in one tensor, so that one collective sums both.
    tally = torch.cat([problem.zeros.sum(0), problem.zeros.new_full((1,), problem.weight.shape[0], dtype=torch.int64)])
    tally = problem.total(tally).cpu()
    budget = tally[:columns].sum().clamp_min(problem.budget.weights)
    return _split(budget[None], tally[None, :columns], int(tally[columns]), problem.blocks())


def _split(budgets: Tensor, zeros: Tensor, rows: int, blocks: Iterable[tuple[int, int]]) -> dict[int, Tensor]:
    """Split each of r budgets over the blocks; return the parts, (r,), by the block's first column.

    The running total is proportional to the columns passed, with one exception: entries that are zero already count towards the
    budget. So a block removes at least its own zeros, and leaves enough of the budget for the zeros of later blocks.

    Args:
        budgets: the budgets, (r,) int64, each at least the number of its zeros.
        zeros: number of zeros, or their mask, by budget and column, (r, b).
        rows: number of rows that share a budget; so each column has this number of its entries.
        blocks: ranges of columns from left to right.
    """
    columns, counts, spent = zeros.shape[1], dict[int, Tensor](), torch.zeros_like(budgets)
    for start, stop in blocks:
        target = budgets * stop // columns - spent
        # The columns to the right must hold enough entries for the rest of the budget.
        target = target.maximum(budgets - spent - rows * (columns - stop))
        counts[start] = target.minimum(budgets - spent - zeros[:, stop:].sum(1)).maximum(zeros[:, start:stop].sum(1))
        spent = spent + counts[start]
    return counts


def _eliminate_block(problem: Problem, weight: Tensor, removed: Tensor, offset: int) -> Tensor:
    """Run the recursion on one block in place; return the errors W_ij / U_jj of the removed entries, (c, k).

    ``weight`` and ``removed`` are views of the block's k columns; ``offset`` is its first column. For n:m this function
    chooses the mask and writes it to ``removed``.
    """
    width, group = weight.shape[1], problem.pattern.group
    upper = problem.upper[offset : offset + width, offset : offset + width]
    if not kernels.usable(weight) or group > kernels.WIDEST_PANEL:
        return _eliminate_lines(problem, weight, removed, upper.contiguous(), offset)
    errors = torch.empty_like(weight, memory_format=torch.contiguous_format)
    panel = kernels.WIDEST_PANEL // group * group
    for start in range(0, width, panel):
        stop = min(start + panel, width)
        errors[:, start:stop] = _eliminate_panel_fused(
            problem, weight[:, start:stop], removed[:, start:stop], upper[start:stop, start:stop], offset + start
        )
        if stop < width:
            weight[:, stop:].addmm_(errors[:, start:stop], upper[start:stop, stop:], alpha=-1)
    return errors


def _eliminate_panel_fused(problem: Problem, weight: Tensor, removed: Tensor, upper: Tensor, offset: int) -> Tensor:
    """Run the recursion on one panel by one kernel for all rows; otherwise like :func:`_eliminate_block`."""
    assert problem.inputs is not None
    errors = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    columns = slice(offset, offset + weight.shape[1])
    group, gone = problem.pattern.group, problem.pattern.group_zeros
    n, m = (group - gone, group) if gone else (0, 0)
    dead, zeros = problem.inputs.dead[columns], problem.zeros[:, columns]
    kernels.eliminate(weight, removed, zeros, upper.contiguous(), dead, errors, n, m)
    return errors


def _eliminate_lines(problem: Problem, weight: Tensor, removed: Tensor, upper: Tensor, offset: int) -> Tensor:
    """Run the recursion on a block by tensor operations, column by column within panels; see :func:`_eliminate_block`.

    It works on the transpose, in which a column is contiguous.
    """
    width, group, by_groups = weight.shape[1], problem.pattern.group, problem.pattern.group_zeros > 0
    lines, reciprocal = weight.contiguous().T.contiguous(), upper.diagonal().reciprocal()[:, None]
    divided = removed.contiguous().T.to(weight.dtype).mul_(reciprocal)  # 1 / U_jj where a weight is removed, else 0
    errors = torch.empty_like(lines)
    panel = max(group, _PANEL) // group * group
    for start in range(0, width, panel):
        stop = min(start + panel, width)
        for j in range(start, stop):
            if by_groups and j % group == 0:
                some = slice(j, j + group)
                chosen = _choose_group(problem, lines[some], offset + j)
                divided[some] = torch.maximum(divided[some], chosen * reciprocal[some])
            torch.mul(lines[j], divided[j], out=errors[j])
            lines[j + 1 : stop].addr_(upper[j, j + 1 : stop], errors[j], alpha=-1)
        lines[stop:].addmm_(upper[start:stop, stop:].T, errors[start:stop], alpha=-1)
    weight.copy_(lines.T.contiguous())
    if by_groups:
        removed.copy_(divided.to(torch.bool).T)
    return errors.T


def _choose_group(problem: Problem, lines: Tensor, start: int) -> Tensor:
    """Return the mask, (m, c) bool, of the n:m group that begins at column ``start``.

    ``lines`` are the group's weights, (m, c), with the updates of all columns before the group.
    """
    scores = problem.mark_zeros(_scores(problem, lines.T, start), start)
    return group_mask(scores.T, problem.pattern.group_zeros)


def cost(pattern: Pattern, size: Size) -> dict[str, Cost]:
    """Return the cost of a solve, by part."""
    c, b = float(size.rows), float(size.columns)
    by_blocks = pattern.any_entries or pattern.group_zeros > 0
    return {
        **({"selection": Cost(3 * c * b, 20 * c * b)} if by_blocks else scoring(pattern, size)),
        "rows": Cost(c * b * size.block, 20 * c * b),
        "update": block_update(size),
    }
