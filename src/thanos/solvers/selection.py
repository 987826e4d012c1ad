"""Exact selection of the k smallest entries, with a defined order among equal scores.

A score is at least 0, or −1 where a weight is already zero and must stay so. Among equal scores the entry with the lower
flat (row-major) index is selected first. The number of selected entries is exactly the requested one.

The k-th smallest score takes linear time, without a sort (radix selection). The bit pattern of a non-negative float, read as
an integer, has the same order as the float; that of −1 is below all of them. Histograms of a few bits at a time, from the
highest bits down, determine the pattern of the k-th smallest. They are integer counts: those of other processes are added, and
the host waits for nothing. On the CPU a histogram is slow and reading a value costs nothing. So there a sample gives a bracket
around the k-th value, and only the entries within the bracket are searched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thanos.solvers.kernels import selection as selection_kernels
from thanos.solvers.kernels import solve as kernels
from thanos.solvers.row_shards import ALONE, RowShards

_DIGIT = 16
"""Bits that one histogram of the general path resolves: float32 takes two histograms, float64 four."""

_SAMPLE = 1 << 14
"""Entries in the CPU's sample: the bracket around the k-th value then holds about one entry in thirty."""

_IN_CACHE = 1 << 17
"""Entries compared at once on the CPU: few enough to stay in the cache from one comparison to the next."""


def smallest_mask(scores: Tensor, count: int | Tensor, row_shards: RowShards = ALONE) -> Tensor:
    """Return a bool mask of the shape of ``scores`` with ``count`` True, at the smallest entries.

    Args:
        scores: the scores of this process's rows, any shape, float32 or float64.
        count: number of entries to select, over all processes: an int, or a 0-d integer tensor that on a GPU is not
            read by the host. Below 0, none are selected; above the number of entries, all.
        row_shards: the processes that hold the other rows.
    """
    if row_shards.size == 1 and scores.device.type == "cpu":
        return _smallest_on_cpu(scores, int(count))
    if kernels.usable(scores):  # also without rows: every process must join the same sums
        lines = scores[None] if scores.dim() == 1 else scores.flatten(0, -2).contiguous()
        total = row_shards.sum_(_count(scores.numel(), scores))
        return KernelSearch(row_shards).smallest(lines, None, None, _bounded(count, total)).view(scores.shape)
    keys = _ordered_bits(scores)
    key, missing = kth_key(keys, count, row_shards)
    below, equal = keys < key, keys == key
    rank = equal.view(-1).cumsum(0).view(equal.shape) + row_shards.before(equal.sum())
    return below | (equal & (rank <= missing))


def _count(number: int | Tensor, like: Tensor) -> Tensor:
    """Return an integer as a 0-d tensor on the device of ``like``, filled there instead of copied from the host."""
    return number if isinstance(number, Tensor) else torch.full((), number, dtype=torch.int64, device=like.device)


def _bounded(count: int | Tensor, total: Tensor) -> Tensor:
    return torch.minimum(_count(count, total), total).clamp_min(0)


class KernelSearch:
    """A search for the k smallest entries by the GPU kernels.

    It keeps a window around the last k-th value, since the next one is rarely far from it. A search makes three passes over the
    weight, which compute the scores as they go, and one over the requested columns. Two more passes, over all bins and for the
    count of ties, return at once if they are not needed. Nothing waits for the host.
    """

    def __init__(self, row_shards: RowShards = ALONE) -> None:
        self._row_shards = row_shards
        self._window: Tensor | None = None

    def smallest(
        self, weight: Tensor, norms: Tensor | None, zeros: Tensor | None, count: Tensor, width: int | None = None
    ) -> Tensor:
        """Return the mask of the ``count`` smallest entries of all processes, in the first ``width`` columns (default: all).

        Args:
            weight: the columns to search, (c, k) float32.
            norms: norms of the input columns, (k,): the scores are |W_ij|·norm_j. None if ``weight`` holds the scores.
            zeros: mask of the entries that are selected first, (c, k) bool; None if there are none.
            count: number of entries to select, 0-d int64, between 0 and the number of entries.
            width: number of columns in the returned mask.
        """
        if self._window is None:
            self._window = torch.zeros((), dtype=torch.int32, device=weight.device)
        histograms = torch.zeros(4, 1 << selection_kernels.BITS, dtype=torch.int32, device=weight.device)
        # Round 3 repeats round 0 over all bins if the window missed, so it comes before the lower digits.
        for round_ in (0, 3, 1, 2):
            selection_kernels.score_histogram(weight, norms, zeros, histograms, count, self._window, round_)
            self._row_shards.sum_(histograms[round_])
        ties = selection_kernels.tie_counts(weight, norms, zeros, histograms, count, self._window)
        before = ties.cumsum(0).sub_(ties)
        if self._row_shards.size > 1:
            before += self._row_shards.before(ties.sum())
        window, self._window = self._window, torch.empty_like(self._window)
        return selection_kernels.block_mask(
            weight[:, :width],
            None if norms is None else norms[:width],
            None if zeros is None else zeros[:, :width],
            histograms,
            count,
            window,
            self._window,
            before,
        )


def _smallest_on_cpu(scores: Tensor, count: int) -> Tensor:
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if count >= scores.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    threshold, equals, missing = kth_on_cpu(scores, count)
    if equals == missing:
        return scores <= threshold
    equal = scores == threshold
    return (scores < threshold) | (equal & (equal.reshape(-1).cumsum(0).view(scores.shape) <= missing))


def kth_on_cpu(scores: Tensor, k: int) -> tuple[float, int, int]:
    """Return the k-th smallest entry (k from 1), the number of entries equal to it, and how many of those are among the k."""
    flat, below = scores.reshape(-1), 0
    candidates = flat
    if flat.numel() > 8 * _SAMPLE:
        # An odd stride: an even one could skip whole columns of a matrix.
        sample = flat[:: flat.numel() // _SAMPLE | 1].contiguous()
        middle, slack = 1 + (k - 1) * len(sample) // flat.numel(), 2 * int(len(sample) ** 0.5)
        low = sample.kthvalue(max(1, middle - slack)).values
        high = sample.kthvalue(min(len(sample), middle + slack)).values
        under, inside = _bracketed(flat, low, high)
        if under < k <= under + inside.numel():  # else the bracket missed the k-th value: search all entries
            candidates, below = inside, under
    value = torch.kthvalue(candidates, k - below).values
    smaller = below + int(torch.count_nonzero(candidates < value))
    return value.item(), int(torch.count_nonzero(candidates == value)), k - smaller


_WORD = 8
"""Entries tested together: their eight booleans are read as one 64-bit integer."""


def _bracketed(flat: Tensor, low: Tensor, high: Tensor) -> tuple[int, Tensor]:
    """Return the number of entries below ``low``, and the entries from ``low`` to ``high``, both included."""
    whole = flat.numel() // _WORD * _WORD
    under, parts = int(torch.count_nonzero(flat[whole:] < low)), [flat[whole:]]
    # Count and subtract floats instead of booleans: the comparison is faster, and these sums are exact.
    first, upto = torch.empty(2, min(whole, _IN_CACHE), dtype=flat.dtype)
    for some in flat[:whole].split(_IN_CACHE):
        first, upto = first[: len(some)], upto[: len(some)]
        under += int(torch.lt(some, low, out=first).sum())
        words = torch.le(some, high, out=upto).sub_(first).to(torch.bool).view(torch.int64)
        parts.append(some.view(-1, _WORD)[words.nonzero().squeeze(1)].view(-1))
    candidates = torch.cat(parts)
    return under, candidates[(candidates >= low).logical_and_(candidates <= high)]


def _ordered_bits(scores: Tensor) -> Tensor:
    # Adding zero turns −0 into 0.
    return (scores + 0.0).view(torch.int64 if scores.dtype == torch.float64 else torch.int32)


def kth_key(keys: Tensor, count: int | Tensor, row_shards: RowShards) -> tuple[Tensor, Tensor]:
    """Return the bit pattern of the ``count``-th smallest key, and how many of the keys equal to it are selected.

    Both are 0-d tensors. If no key is selected, the pattern is below all others.
    """
    missing = _bounded(count, row_shards.sum_(_count(keys.numel(), keys)))
    nothing = missing == 0
    missing = missing.clamp_min(1)
    bits = keys.element_size() * 8
    flat, prefix = keys.reshape(-1), torch.zeros((), dtype=torch.int64, device=keys.device)
    ones = torch.ones((), dtype=torch.int64, device=keys.device).expand(flat.numel())
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        high = flat.to(torch.int64) >> shift
        # The highest digit is signed: add an offset, so that it counts from 0.
        digit = high + (1 << (_DIGIT - 1)) if shift == bits - _DIGIT else high - (prefix << _DIGIT)
        inside = (digit >= 0) & (digit < 1 << _DIGIT)
        bins = torch.where(inside, digit, 1 << _DIGIT)
        histogram = torch.zeros((1 << _DIGIT) + 1, dtype=torch.int64, device=keys.device).scatter_add_(0, bins, ones)
        histogram = row_shards.sum_(histogram)[:-1]
        below = histogram.cumsum(0)
        chosen = torch.searchsorted(below, missing)
        missing = missing - (below.take(chosen) - histogram.take(chosen))  # indexing would synchronise
        prefix = chosen - (1 << (_DIGIT - 1)) if shift == bits - _DIGIT else (prefix << _DIGIT) + chosen
    lowest = torch.iinfo(keys.dtype).min
    return torch.where(nothing, lowest, prefix).to(keys.dtype), torch.where(nothing, 0, missing)
