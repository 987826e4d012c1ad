"""Exact selection within rows and within groups of a row; the order among equal scores is that of :mod:`selection`.

With row budgets every row loses its own number of entries. The numbers of two rows differ by at most one, unless a row has
more zeros already. They add up to the layer's budget.
"""

from __future__ import annotations

import bisect
import math

import torch
from torch import Tensor

from thanos.solvers.kernels import row_selection as row_kernels
from thanos.solvers.kernels import solve as kernels
from thanos.solvers.row_shards import ALONE, RowShards
from thanos.solvers.selection import smallest_mask

_AT_ONCE = 1 << 20
"""Entries whose rows are sorted at once on the CPU: a sort holds four times the memory of its scores."""


def row_smallest_mask(scores: Tensor, counts: Tensor | int) -> Tensor:
    """Return a mask with exactly ``counts`` (an int, or one per row, (c,)) True in each row of ``scores`` (c, b)."""
    if isinstance(counts, int):
        chosen = scores.sort(dim=1, stable=True).indices[:, :counts]
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)
    if kernels.usable(scores):
        return smallest_of_rows(scores, torch.ones_like(scores[:1]).squeeze(0), scores < 0, counts, scores.shape[1])
    mask = torch.zeros_like(scores, dtype=torch.bool)
    rows = max(1, _AT_ONCE // max(1, scores.shape[1])) if scores.device.type == "cpu" else max(1, len(scores))
    for some, here, wanted in zip(scores.split(rows), mask.split(rows), counts.split(rows), strict=True):
        order = some.sort(dim=1, stable=True).indices
        here.scatter_(1, order, torch.arange(scores.shape[1], device=scores.device) < wanted[:, None])
    return mask


def even_rows_mask(scores: Tensor, count: int, row_shards: RowShards = ALONE) -> Tensor:
    """Return the mask of ``count`` entries over the rows of all processes, as many in each row as :func:`row_budgets` says."""
    return row_smallest_mask(scores, row_budgets(scores, count, row_shards))


def row_budgets(scores: Tensor, count: int, row_shards: RowShards = ALONE) -> Tensor:
    """Split ``count`` entries over the rows of all processes, as evenly as possible.

    Each row gives ⌊count / rows⌋ entries. The remainder comes from the rows whose next score is smallest, so that the
    result does not depend on the order of the rows. A row with more zeros than its number gives all its zeros, and the other
    rows give that many fewer. So the total is ``count``, or the number of zeros if that is larger.

    Args:
        scores: the scores of this process's rows, (c, b); −1 marks an entry that is zero already.
        count: number of entries to select, over all processes.
        row_shards: the processes that hold the other rows.

    Returns:
        The number of entries of each row of this process, (c,) int64.
    """
    columns = scores.shape[1]
    rows = (
        int(row_shards.sum_(torch.tensor(scores.shape[0], device=scores.device)))
        if row_shards.size > 1
        else scores.shape[0]
    )
    count = min(count, rows * columns)
    zeros = (scores < 0).sum(1)

    def taken(level: int) -> int:
        return int(row_shards.sum_(zeros.clamp_min(level).sum()))

    level = count // rows
    if taken(level) > count:  # the highest level within count; −1 if there are too many zeros for any
        level = bisect.bisect_right(range(level), count, key=taken) - 1
    if level < 0:
        return zeros
    counts, extra = zeros.clamp_min(level), count - taken(level)
    if extra:
        following = scores.kthvalue(level + 1, dim=1).values.masked_fill_(zeros > level, math.inf)
        counts += smallest_mask(following, extra, row_shards)
    return counts


def smallest_of_rows(weight: Tensor, norms: Tensor, zeros: Tensor | None, counts: Tensor, width: int) -> Tensor:
    """Return which of the first ``width`` columns hold entries that are among the smallest scores of their row.

    Only the row itself decides, so that the processes that share the rows need not communicate. Nothing waits for the host on
    a GPU.

    Args:
        weight: the columns to search, (c, k), float32 or float64.
        norms: factors of the columns, (k,): the scores are |W_ij|·norm_j.
        zeros: mask of the entries that are selected first, (c, k) bool; None if there are none.
        counts: number of entries to select in each row, (c,) int64, between 0 and k.
        width: number of columns in the returned mask, at most k.

    Returns:
        The mask, (c, width) bool.
    """
    if kernels.usable(weight):
        return row_kernels.row_mask(weight, norms, zeros, counts, width)
    scores = (weight * norms).abs_()
    if zeros is not None:
        scores.masked_fill_(zeros, -1.0)
    key = _kth_of_rows(scores, counts)[:, None]
    missing = counts - (scores < key).sum(1)
    equal = scores[:, :width] == key
    return (scores[:, :width] < key) | (equal & (equal.cumsum(1) <= missing[:, None]))


def _kth_of_rows(scores: Tensor, counts: Tensor) -> Tensor:
    """Return the ``counts``-th smallest score of each row, (c,); −∞ for a count of 0."""
    if scores.device.type != "cpu":
        kth = scores.sort(dim=1).values.gather(1, (counts - 1).clamp_min(0)[:, None]).squeeze(1)
        return torch.where(counts > 0, kth, -math.inf)
    # The counts take few distinct values. One search for the rows of each value takes a third of the time of sorting all rows.
    kth = torch.full((len(scores),), -math.inf, dtype=scores.dtype)
    for count in counts.unique().tolist():
        for rows in (
            (counts == count).nonzero().squeeze(1).split(max(1, _AT_ONCE // scores.shape[1])) if count > 0 else ()
        ):
            kth[rows] = scores[rows].kthvalue(count, dim=1).values
    return kth


_RANKED_GROUP = 16
"""Groups of up to this many entries are ranked by comparing all pairs; larger ones are sorted."""


def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Return the mask, (c, b), of the m − n smallest scores of every m consecutive entries of a row; m divides b."""
    groups = scores.reshape(-1, m)
    if m > _RANKED_GROUP:
        return row_smallest_mask(groups, m - n).view(scores.shape)
    # One line for each index in the group: few long lines instead of many short ones.
    lines = torch.stack(groups.unbind(1))
    return torch.stack(group_mask(lines, m - n).unbind(0), 1).view(scores.shape)


def group_mask(lines: Tensor, count: int) -> Tensor:
    """Return the mask of the ``count`` smallest of every column of ``lines`` (m, any); of equal ones, the upper first."""
    # An entry's rank is the number of entries before it. It starts as the number of lines above; a pair whose lower entry
    # is smaller swaps its order.
    size = len(lines)
    kind = lines.dtype if lines.device.type == "cpu" else torch.uint8  # the CPU is slow at booleans and small integers
    rank = torch.arange(size, dtype=kind, device=lines.device)[:, None].repeat(1, lines.shape[1])
    after = torch.empty_like(rank[0])
    for i in range(size):
        for j in range(i + 1, size):
            torch.gt(lines[i], lines[j], out=after)
            rank[i] += after
            rank[j] -= after
    return rank < count
