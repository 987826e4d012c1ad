"""Exact selection: which entries are the smallest, with a documented order among equals.

Scores are at least 0, or −1 where a weight is already zero and must stay so. Among equal scores the entry with the lower
flat (row-major) index goes first. Exactly the requested number is selected, never one more or less.
"""

from __future__ import annotations

import torch
from torch import Tensor


def smallest_mask(scores: Tensor, count: int | Tensor) -> Tensor:
    """Return a bool mask of the shape of ``scores`` with exactly ``count`` True, at the smallest entries."""
    count = int(count)
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if count >= scores.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    flat = scores.reshape(-1)
    threshold = _kth_smallest(flat, count)
    below = flat < threshold
    equal = flat == threshold
    missing = count - below.sum()
    if flat.device.type == "cpu" and int(equal.sum()) == int(missing):
        return (below | equal).view(scores.shape)
    # int32 suffices: torch indexes at most 2³¹ entries of a weight matrix here.
    first = equal.cumsum(0, dtype=torch.int32) <= missing
    return (below | (equal & first)).view(scores.shape)


def _kth_smallest(flat: Tensor, k: int) -> Tensor:
    """Return the k-th smallest entry (k from 1), as a 0-d tensor."""
    if flat.dtype != torch.float32 or flat.device.type == "cpu":
        return torch.kthvalue(flat, k).values
    # Two rounds of 16 bits over the bit pattern, which orders non-negative floats as the values do; −1 sorts below.
    keys = (flat + 0.0).view(torch.int32)
    high = (keys >> 16) + 32768
    low_count, high_bin = _find_bin(torch.bincount(high, minlength=65536), k)
    candidates = keys[high == high_bin] & 0xFFFF
    _, low_bin = _find_bin(torch.bincount(candidates, minlength=65536), k - int(low_count))
    bits = ((high_bin - 32768) << 16) | low_bin
    return bits.to(torch.int32).view(torch.float32)


def _find_bin(histogram: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return how many entries lie below the bin that holds the k-th, and that bin's index."""
    total = histogram.cumsum(0)
    index = torch.searchsorted(total, k)
    return total[index] - histogram[index], index


def row_smallest_mask(scores: Tensor, counts: Tensor | int) -> Tensor:
    """Return a mask with exactly ``counts`` (an int, or one per row) True in each row of ``scores`` (c, b)."""
    order = scores.sort(dim=1, stable=True).indices
    if isinstance(counts, int):
        chosen = order[:, :counts]
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)
    chosen = torch.arange(scores.shape[1], device=scores.device) < counts[:, None]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, chosen)


def even_rows_mask(scores: Tensor, count: int) -> Tensor:
    """Select ``count`` entries in all, the same number per row up to one.

    Each row gives ⌊count / rows⌋; what is left over comes from the rows whose next score is smallest, so that the
    result does not depend on the order of the rows.
    """
    rows, columns = scores.shape
    base, extra = divmod(min(count, scores.numel()), rows)
    if extra == 0:
        return row_smallest_mask(scores, base)
    following = scores.kthvalue(base + 1, dim=1).values if base < columns else scores.new_zeros(rows)
    return row_smallest_mask(scores, base + smallest_mask(following, extra).to(torch.int64))


def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Select the m − n smallest scores of every m consecutive entries of a row; (c, b), m divides b."""
    groups = scores.reshape(-1, m)
    return row_smallest_mask(groups, m - n).view(scores.shape)
