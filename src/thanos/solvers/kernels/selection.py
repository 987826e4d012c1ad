"""Triton kernels for the k-th smallest score and the mask of the scores up to it.

They build histograms over the bits of the scores, digit by digit, without a synchronisation with the host. Plain tensor
operations for the same selection are in :mod:`thanos.solvers.selection`. See :mod:`thanos.solvers.kernels.solve` for the other
kernels, and for the tensors that kernels can process.
"""

# pyright: reportInvalidTypeForm=false
# Triton needs ``tl.constexpr`` in a signature; without Triton the type checker treats ``tl`` as a variable, not a module.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from thanos.solvers.kernels import solve as kernels
from thanos.solvers.kernels.solve import on_its_device

triton: Any = kernels.triton
tl: Any = kernels.tl

BITS = 11
"""Bits of a histogram's digit: 32 bits take three rounds (11 + 11 + 10), and the bins fit a block's registers."""

_BINS = 1 << BITS

_WINDOW = 256
"""Bins of the first round, around the bin of the last threshold: counting into few bins is several times as fast."""

_ROWS = 32
"""Rows of one program of the histogram kernel."""


if triton is not None:

    @triton.jit
    def _keys(
        weight, norms, zeros, rows, columns, row, column, weight_stride, zeros_stride,
        HAS_NORMS: tl.constexpr, HAS_ZEROS: tl.constexpr,
    ):  # fmt: skip
        """Return the ordered bits of a tile's scores, with the bits of −1 at ``zeros``, and the mask of entries that exist."""
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        offset = row.to(tl.int64)[:, None] * weight_stride + column[None, :]
        score = tl.load(weight + offset, mask=inside, other=0.0) + 0.0  # −0 becomes 0
        if HAS_NORMS:
            score = tl.abs(score) * tl.load(norms + column, mask=column < columns, other=0.0)[None, :]
        key = score.to(tl.int32, bitcast=True)
        if HAS_ZEROS:
            zero = tl.load(zeros + row.to(tl.int64)[:, None] * zeros_stride + column[None, :], mask=inside, other=0)
            key = tl.where(zero != 0, -1082130432, key)  # the bits of −1.0
        return key, inside

    @triton.jit
    def _find(histogram, wanted, BINS: tl.constexpr):
        """Return the bin of the ``wanted``-th entry (from 1), how many entries of the bin are wanted, and the bin's size."""
        bins = tl.arange(0, BINS)
        counts = tl.load(histogram + bins).to(tl.int64)
        upto = tl.cumsum(counts, 0)
        chosen = tl.sum((upto < wanted).to(tl.int32), 0)
        chosen = tl.minimum(chosen, BINS - 1)
        below = tl.sum(tl.where(bins < chosen, counts, 0), 0)
        size = tl.sum(tl.where(bins == chosen, counts, 0), 0)
        return chosen, wanted - below, size

    @triton.jit
    def _first(histograms, wanted, base, BINS: tl.constexpr, WINDOW: tl.constexpr):
        """Return the first digit by the window's counts if it is within the window, else by the counts of all bins in row 3."""
        found, left, size = _find(histograms, wanted, BINS)
        # The outermost bins of the window stand for everything below and above it.
        missed = (found <= base) | (found >= base + WINDOW - 1)
        if missed:
            found, left, size = _find(histograms + 3 * BINS, wanted, BINS)
        return found, left, size, missed

    @triton.jit
    def _threshold(histograms, wanted, base, BINS: tl.constexpr, WINDOW: tl.constexpr, ROUNDS: tl.constexpr):
        """Return the bits of the threshold's key that the first ``ROUNDS`` rounds determine.

        Also return how many of the entries with these bits are wanted, and how many there are.
        """
        found, wanted, size, _ = _first(histograms, wanted, base, BINS, WINDOW)
        prefix = found - BINS // 2
        if ROUNDS >= 2:
            found, wanted, size = _find(histograms + BINS, wanted, BINS)
            prefix = prefix * 2048 + found
        if ROUNDS >= 3:
            found, wanted, size = _find(histograms + 2 * BINS, wanted, BINS)
            prefix = prefix * 1024 + found
        return prefix, wanted, size

    @triton.jit
    def _histogram_kernel(
        weight, norms, zeros, histograms, wanted, window, rows, columns, weight_stride, zeros_stride,
        HAS_NORMS: tl.constexpr, HAS_ZEROS: tl.constexpr, ROUND: tl.constexpr, BINS: tl.constexpr,
        WINDOW: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    ):  # fmt: skip
        # A program goes along its BR rows in strides; neighbouring programs read neighbouring columns. Round 0 counts the
        # first digit within the window. Round 3 counts it over all bins, but only if the window missed it.
        row = tl.program_id(0) * BR + tl.arange(0, BR)
        base = tl.load(window)
        if ROUND == 0:
            counts = tl.zeros((WINDOW,), tl.int32)
            outside = 0
            for start in range(tl.program_id(1) * BC, columns, tl.num_programs(1) * BC):
                column = start + tl.arange(0, BC)
                key, inside = _keys(
                    weight, norms, zeros, rows, columns, row, column, weight_stride, zeros_stride, HAS_NORMS, HAS_ZEROS
                )
                digit = tl.minimum(tl.maximum((key >> 21) + BINS // 2 - base, 0), WINDOW - 1)
                # Entries outside the matrix are counted in the first bin and subtracted below.
                digit = tl.where(inside, digit, 0)
                outside += tl.sum((~inside).to(tl.int32))
                counts += tl.histogram(tl.reshape(digit, (BR * BC,)), WINDOW)
            bins = tl.arange(0, WINDOW)
            counts -= tl.where(bins == 0, outside, 0)
            tl.atomic_add(histograms + base + bins, counts, mask=counts > 0)
        elif ROUND == 3:
            _, _, _, missed = _first(histograms, tl.load(wanted), base, BINS, WINDOW)
            if missed:
                counts = tl.zeros((BINS,), tl.int32)
                for start in range(tl.program_id(1) * BC, columns, tl.num_programs(1) * BC):
                    column = start + tl.arange(0, BC)
                    key, inside = _keys(
                        weight, norms, zeros, rows, columns, row, column, weight_stride, zeros_stride, HAS_NORMS,
                        HAS_ZEROS,
                    )  # fmt: skip
                    # The last bin is for NaN only. Entries outside the matrix are counted there, and the bin is left out below.
                    digit = tl.where(inside, (key >> 21) + BINS // 2, BINS - 1)
                    counts += tl.histogram(tl.reshape(digit, (BR * BC,)), BINS)
                bins = tl.arange(0, BINS)
                tl.atomic_add(histograms + 3 * BINS + bins, counts, mask=(counts > 0) & (bins < BINS - 1))
        else:
            prefix, _, _ = _threshold(histograms, tl.load(wanted), base, BINS, WINDOW, ROUND)
            for start in range(tl.program_id(1) * BC, columns, tl.num_programs(1) * BC):
                column = start + tl.arange(0, BC)
                key, inside = _keys(
                    weight, norms, zeros, rows, columns, row, column, weight_stride, zeros_stride, HAS_NORMS, HAS_ZEROS
                )
                if ROUND == 1:
                    match = inside & ((key >> 21) == prefix)
                    digit = (key >> 10) & 2047
                else:
                    match = inside & ((key >> 10) == prefix)
                    digit = key & 1023
                tl.atomic_add(histograms + ROUND * BINS + digit, 1, mask=match)

    @triton.jit
    def _tie_counts_kernel(
        weight, norms, zeros, histograms, wanted, window, ties, rows, columns, weight_stride, zeros_stride,
        HAS_NORMS: tl.constexpr, HAS_ZEROS: tl.constexpr, BINS: tl.constexpr, WINDOW: tl.constexpr,
        BR: tl.constexpr, BC: tl.constexpr,
    ):  # fmt: skip
        # Counts the entries of each row that equal the threshold. If all of them are wanted, nothing is read.
        row = tl.program_id(0) * BR + tl.arange(0, BR)
        count = tl.zeros((BR,), tl.int64)
        key_wanted, missing, size = _threshold(histograms, tl.load(wanted), tl.load(window), BINS, WINDOW, 3)
        if missing < size:
            for start in range(0, columns, BC):
                column = start + tl.arange(0, BC)
                key, inside = _keys(
                    weight, norms, zeros, rows, columns, row, column, weight_stride, zeros_stride, HAS_NORMS, HAS_ZEROS
                )
                count += tl.sum((inside & (key == key_wanted)).to(tl.int64), 1)
        tl.store(ties + row, count, mask=row < rows)

    @triton.jit
    def _block_mask_kernel(
        weight, norms, zeros, histograms, wanted, window, following, ties_before, mask, rows, columns, weight_stride,
        zeros_stride, HAS_NORMS: tl.constexpr, HAS_ZEROS: tl.constexpr, BINS: tl.constexpr, WINDOW: tl.constexpr,
        BR: tl.constexpr, BC: tl.constexpr,
    ):  # fmt: skip
        # ``columns`` is the width of the block: the first of the columns that the histograms counted.
        row = tl.program_id(0) * BR + tl.arange(0, BR)
        wanted_count = tl.load(wanted)
        key_wanted, missing, _ = _threshold(histograms, wanted_count, tl.load(window), BINS, WINDOW, 3)
        if tl.program_id(0) == 0:
            middle = (key_wanted >> 21) + BINS // 2 - WINDOW // 2
            tl.store(following, tl.minimum(tl.maximum(middle, 0), BINS - WINDOW))
        rank = tl.load(ties_before + row, mask=row < rows, other=0)
        for start in range(0, columns, BC):
            column = start + tl.arange(0, BC)
            key, inside = _keys(
                weight, norms, zeros, rows, columns, row, column, weight_stride, zeros_stride, HAS_NORMS, HAS_ZEROS
            )
            equal = (inside & (key == key_wanted)).to(tl.int64)
            position = rank[:, None] + tl.cumsum(equal, 1)
            chosen = (key < key_wanted) | ((equal != 0) & (position <= missing))
            chosen = chosen & (wanted_count > 0)
            rank += tl.sum(equal, 1)
            spot = row.to(tl.int64)[:, None] * columns + column[None, :]
            tl.store(mask + spot, chosen.to(tl.int8), mask=inside)


@on_its_device
def score_histogram(
    weight: Tensor,
    norms: Tensor | None,
    zeros: Tensor | None,
    histograms: Tensor,
    wanted: Tensor,
    window: Tensor,
    round_: int,
) -> None:
    """Add the counts of one digit of the scores |W_ij|·norm_j to ``histograms`` (4, 2048) int32.

    Args:
        weight: the columns to search, (c, k) float32, rows contiguous.
        norms: norms of the input columns, (k,); None if ``weight`` holds the scores.
        zeros: mask of the entries whose score is −1, (c, k) bool; None if there are none.
        histograms: one row for each round. Those of earlier rounds are complete.
        wanted: rank of the k-th smallest, from 1; 0-d int64.
        window: first bin of the window, 0-d int32.
        round_: 0 (the first digit within the window), 3 (over all bins, if the window missed it), 1 or 2, in this order.
    """
    rows, columns = weight.shape
    tile = 128
    grid = (triton.cdiv(rows, _ROWS), min(8, triton.cdiv(columns, tile)))
    _histogram_kernel[grid](
        weight, _or(norms, weight), _bytes(zeros, weight), histograms, wanted, window, rows, columns,
        weight.stride(0), _stride(zeros), HAS_NORMS=norms is not None, HAS_ZEROS=zeros is not None, ROUND=round_,
        BINS=_BINS, WINDOW=_WINDOW, BR=_ROWS, BC=tile, num_warps=8,
    )  # fmt: skip


@on_its_device
def tie_counts(
    weight: Tensor, norms: Tensor | None, zeros: Tensor | None, histograms: Tensor, wanted: Tensor, window: Tensor
) -> Tensor:
    """Return for each row how many scores equal the k-th smallest, (c,) int64; zeros if all of them are wanted."""
    rows, columns = weight.shape
    ties = torch.empty(rows, dtype=torch.int64, device=weight.device)
    _tie_counts_kernel[(triton.cdiv(rows, 8),)](
        weight, _or(norms, weight), _bytes(zeros, weight), histograms, wanted, window, ties, rows, columns,
        weight.stride(0), _stride(zeros), HAS_NORMS=norms is not None, HAS_ZEROS=zeros is not None,
        BINS=_BINS, WINDOW=_WINDOW, BR=8, BC=256, num_warps=8,
    )  # fmt: skip
    return ties


@on_its_device
def block_mask(
    weight: Tensor,
    norms: Tensor | None,
    zeros: Tensor | None,
    histograms: Tensor,
    wanted: Tensor,
    window: Tensor,
    following: Tensor,
    ties_before: Tensor,
) -> Tensor:
    """Return the mask of the ``wanted`` smallest entries in ``weight``, the first k columns of those counted; (c, k) bool.

    ``ties_before``, (c,) int64, is the number of entries equal to the threshold in all earlier rows. The kernel writes the
    window for the next search, around this threshold, to ``following``.
    """
    rows, columns = weight.shape
    mask = torch.empty(rows, columns, dtype=torch.bool, device=weight.device)
    _block_mask_kernel[(triton.cdiv(rows, 8),)](
        weight, _or(norms, weight), _bytes(zeros, weight), histograms, wanted, window, following, ties_before,
        mask.view(torch.int8), rows, columns, weight.stride(0), _stride(zeros), HAS_NORMS=norms is not None,
        HAS_ZEROS=zeros is not None, BINS=_BINS, WINDOW=_WINDOW, BR=8, BC=128, num_warps=4,
    )  # fmt: skip
    return mask


def _or(tensor: Tensor | None, instead: Tensor) -> Tensor:
    # Triton needs a pointer even for an argument that the kernel does not use.
    return instead if tensor is None else tensor


def _bytes(zeros: Tensor | None, instead: Tensor) -> Tensor:
    return instead if zeros is None else zeros.view(torch.int8)


def _stride(zeros: Tensor | None) -> int:
    return 0 if zeros is None else zeros.stride(0)
