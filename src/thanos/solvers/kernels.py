"""Triton kernels for the inner loops that are short of launches rather than of arithmetic.

Each has a twin in plain tensor operations, where it is called and which the tests compare it with; without Triton, or on
another device, the twin runs. No kernel multiplies matrices, so none can round to TF32.

    histogram, tie_counts, block_mask   the k-th smallest score |W_ij|·‖X_j‖ and the mask it gives (select.py)
    gradient_step                       one step of conjugate gradients but for its matrix product (rows.py)
    eliminate                           SparseGPT's recursion over one panel of columns (sparsegpt.py)
"""

# pyright: reportInvalidTypeForm=false
# Triton reads ``tl.constexpr`` in a signature; the type checker, here without Triton, takes ``tl`` for a variable.

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

try:
    triton: Any = import_module("triton")
    tl: Any = import_module("triton.language")
except ImportError:  # CPU builds of torch come without it
    triton = tl = None

BITS = 11
"""A histogram's digit: 32 bits in three rounds (11 + 11 + 10), and bins that fit a block's registers."""

_BINS = 1 << BITS

_ROWS = 32
"""Rows per program where a program walks along rows."""


def usable(tensor: Tensor) -> bool:
    """Whether the kernels can work on this tensor."""
    return triton is not None and tensor.is_cuda and tensor.dtype == torch.float32


if triton is not None:

    @triton.jit
    def _keys(weight, norms, zeros, rows, columns, row, column, weight_stride, zeros_stride, HAS_ZEROS: tl.constexpr):
        """Return the ordered bits of |W_ij|·norm_j for a tile, −1's where the weight was zero, and which exist."""
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        place = row.to(tl.int64)[:, None] * weight_stride + column[None, :]
        score = tl.abs(tl.load(weight + place, mask=inside, other=0.0))
        score = score * tl.load(norms + column, mask=column < columns, other=0.0)[None, :]
        key = score.to(tl.int32, bitcast=True)
        if HAS_ZEROS:
            zero = tl.load(zeros + row.to(tl.int64)[:, None] * zeros_stride + column[None, :], mask=inside, other=0)
            key = tl.where(zero != 0, -1, key)
        return key, inside

    @triton.jit
    def _find(histogram, wanted, BINS: tl.constexpr):
        """Return the bin that holds the ``wanted``-th entry (from 1), how many of its entries are wanted, and its size."""
        bins = tl.arange(0, BINS)
        counts = tl.load(histogram + bins).to(tl.int64)
        upto = tl.cumsum(counts, 0)
        chosen = tl.sum((upto < wanted).to(tl.int32), 0)
        chosen = tl.minimum(chosen, BINS - 1)
        below = tl.sum(tl.where(bins < chosen, counts, 0), 0)
        size = tl.sum(tl.where(bins == chosen, counts, 0), 0)
        return chosen, wanted - below, size

    @triton.jit
    def _threshold(histograms, wanted, BINS: tl.constexpr, ROUNDS: tl.constexpr):
        """Return the key's bits found in the first ``ROUNDS`` rounds, how many equals are wanted, and how many there are."""
        prefix = 0
        size = wanted
        for r in tl.static_range(ROUNDS):
            found, wanted, size = _find(histograms + r * BINS, wanted, BINS)
            if r == 0:
                prefix = found - BINS // 2
            elif r == 1:
                prefix = prefix * 2048 + found
            else:
                prefix = prefix * 1024 + found
        return prefix, wanted, size

    @triton.jit
    def _histogram_kernel(
        weight, norms, zeros, histograms, wanted, rows, columns, weight_stride, zeros_stride,
        HAS_ZEROS: tl.constexpr, ROUND: tl.constexpr, BINS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    ):  # fmt: skip
        # A program takes BR rows and strides along them; programs side by side read neighbouring columns.
        row = tl.program_id(0) * BR + tl.arange(0, BR)
        if ROUND == 0:
            counts = tl.zeros((BINS,), tl.int32)
            for start in range(tl.program_id(1) * BC, columns, tl.num_programs(1) * BC):
                column = start + tl.arange(0, BC)
                key, inside = _keys(
                    weight, norms, zeros, rows, columns, row, column, weight_stride, zeros_stride, HAS_ZEROS
                )
                # The last bin holds NaNs only: what lies outside the matrix goes there and is left out below.
                digit = tl.where(inside, (key >> 21) + BINS // 2, BINS - 1)
                counts += tl.histogram(tl.reshape(digit, (BR * BC,)), BINS)
            bins = tl.arange(0, BINS)
            tl.atomic_add(histograms + bins, counts, mask=(counts > 0) & (bins < BINS - 1))
        else:
            prefix, _, _ = _threshold(histograms, tl.load(wanted), BINS, ROUND)
            for start in range(tl.program_id(1) * BC, columns, tl.num_programs(1) * BC):
                column = start + tl.arange(0, BC)
                key, inside = _keys(
                    weight, norms, zeros, rows, columns, row, column, weight_stride, zeros_stride, HAS_ZEROS
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
        weight, norms, zeros, histograms, wanted, ties, rows, columns, weight_stride, zeros_stride,
        HAS_ZEROS: tl.constexpr, BINS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    ):  # fmt: skip
        # How many entries of each row equal the threshold; only read where not all of them are wanted.
        row = tl.program_id(0) * BR + tl.arange(0, BR)
        count = tl.zeros((BR,), tl.int64)
        key_wanted, missing, size = _threshold(histograms, tl.load(wanted), BINS, 3)
        if missing < size:
            for start in range(0, columns, BC):
                column = start + tl.arange(0, BC)
                key, inside = _keys(
                    weight, norms, zeros, rows, columns, row, column, weight_stride, zeros_stride, HAS_ZEROS
                )
                count += tl.sum((inside & (key == key_wanted)).to(tl.int64), 1)
        tl.store(ties + row, count, mask=row < rows)

    @triton.jit
    def _block_mask_kernel(
        weight, norms, zeros, histograms, wanted, ties_before, mask, rows, columns, weight_stride, zeros_stride,
        HAS_ZEROS: tl.constexpr, BINS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    ):  # fmt: skip
        # ``columns`` is the width of the block, whose columns come first among those that were counted.
        row = tl.program_id(0) * BR + tl.arange(0, BR)
        wanted_count = tl.load(wanted)
        key_wanted, missing, _ = _threshold(histograms, wanted_count, BINS, 3)
        rank = tl.load(ties_before + row, mask=row < rows, other=0)
        for start in range(0, columns, BC):
            column = start + tl.arange(0, BC)
            key, inside = _keys(
                weight, norms, zeros, rows, columns, row, column, weight_stride, zeros_stride, HAS_ZEROS
            )
            equal = (inside & (key == key_wanted)).to(tl.int64)
            place = rank[:, None] + tl.cumsum(equal, 1)
            chosen = (key < key_wanted) | ((equal != 0) & (place <= missing))
            chosen = chosen & (wanted_count > 0)
            rank += tl.sum(equal, 1)
            spot = row.to(tl.int64)[:, None] * columns + column[None, :]
            tl.store(mask + spot, chosen.to(tl.int8), mask=inside)

    @triton.jit
    def _gradient_step_kernel(
        direction, image, mask, solution, residual, energy, rows, columns, BR: tl.constexpr, BC: tl.constexpr
    ):
        row = tl.program_id(0) * BR + tl.arange(0, BR)
        column = tl.arange(0, BC)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        place = row.to(tl.int64)[:, None] * columns + column[None, :]
        d = tl.load(direction + place, mask=inside, other=0.0)
        support = tl.load(mask + place, mask=inside, other=0) != 0
        a = tl.where(support, tl.load(image + place, mask=inside, other=0.0), 0.0)
        old = tl.load(energy + row, mask=row < rows, other=0.0)
        curvature = tl.sum(d * a, 1)
        alpha = tl.where(curvature > 0, old / tl.where(curvature > 0, curvature, 1.0), 0.0)
        tl.store(solution + place, tl.load(solution + place, mask=inside) + alpha[:, None] * d, mask=inside)
        r = tl.load(residual + place, mask=inside, other=0.0) - alpha[:, None] * a
        tl.store(residual + place, r, mask=inside)
        new = tl.sum(r * r, 1)
        beta = tl.where(old > 0, new / tl.where(old > 0, old, 1.0), 0.0)
        tl.store(direction + place, r + beta[:, None] * d, mask=inside)
        tl.store(energy + row, new, mask=row < rows)

    @triton.jit
    def _eliminate_kernel(
        weight, removed, zeros, upper, dead, errors, rows, columns, weight_stride, removed_stride, zeros_stride,
        errors_stride, N: tl.constexpr, M: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    ):  # fmt: skip
        # A tile of rows goes through the panel's columns on its own; M = 0: ``removed`` is given, else decided by groups.
        row = tl.program_id(0) * BR + tl.arange(0, BR)
        column = tl.arange(0, BC)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        wide = row.to(tl.int64)[:, None]
        w = tl.load(weight + wide * weight_stride + column[None, :], mask=inside, other=0.0)
        gone = tl.load(removed + wide * removed_stride + column[None, :], mask=inside, other=0).to(tl.int32)
        error = tl.zeros((BR, BC), tl.float32)
        zero, alive, diagonal = gone, column < columns, column
        if M > 0:
            zero = tl.load(zeros + wide * zeros_stride + column[None, :], mask=inside, other=0)
            alive = tl.load(dead + column, mask=column < columns, other=1) == 0
            diagonal = tl.load(upper + column * columns + column, mask=column < columns, other=1.0)
        for j in range(columns):
            if M > 0:  # noqa: SIM102, known when compiled
                if j % M == 0:
                    group = (column >= j) & (column < j + M)
                    score = w / diagonal[None, :]
                    score = tl.where(alive[None, :], score * score, 0.0)
                    score = tl.where(zero != 0, -1.0, score)
                    for i in range(M):
                        this = column[None, :] == j + i
                        mine = tl.sum(tl.where(this, score, 0.0), 1)[:, None]
                        before = (score < mine) | ((score == mine) & (column[None, :] < j + i))
                        rank = tl.sum((group[None, :] & before).to(tl.int32), 1)[:, None]
                        gone = tl.where(this & (rank < M - N), 1, gone)
            here = column[None, :] == j
            line = tl.load(upper + j * columns + column, mask=(column >= j) & (column < columns), other=0.0)
            pivot = tl.load(upper + j * columns + j)
            e = tl.sum(tl.where(here & (gone != 0), w, 0.0), 1) / pivot
            w = w - e[:, None] * line[None, :]
            error = tl.where(here, e[:, None], error)
        tl.store(weight + wide * weight_stride + column[None, :], w, mask=inside)
        tl.store(errors + wide * errors_stride + column[None, :], error, mask=inside)
        if M > 0:
            tl.store(removed + wide * removed_stride + column[None, :], gone.to(tl.int8), mask=inside)


def score_histogram(
    weight: Tensor, norms: Tensor, zeros: Tensor | None, histograms: Tensor, wanted: Tensor, round_: int
) -> None:
    """Add the histogram of one digit of the scores |W_ij|·norm_j to ``histograms`` (3, 2048) int32.

    Args:
        weight: (c, k) float32, rows contiguous.
        norms: (k,).
        zeros: entries whose score is −1, (c, k) bool; None if there are none.
        histograms: of the rounds; the earlier ones are complete.
        wanted: k of the k-th smallest, 0-d int64.
        round_: 0, 1 or 2.
    """
    rows, columns = weight.shape
    tile = 128
    grid = (triton.cdiv(rows, _ROWS), min(8, triton.cdiv(columns, tile)))
    _histogram_kernel[grid](
        weight, norms, _bytes(zeros, weight), histograms, wanted, rows, columns, weight.stride(0), _stride(zeros),
        HAS_ZEROS=zeros is not None, ROUND=round_, BINS=_BINS, BR=_ROWS, BC=tile, num_warps=8,
    )  # fmt: skip


def tie_counts(weight: Tensor, norms: Tensor, zeros: Tensor | None, histograms: Tensor, wanted: Tensor) -> Tensor:
    """Return per row, (c,) int64, how many scores equal the k-th smallest; zeros where all of them are wanted anyway."""
    rows, columns = weight.shape
    ties = torch.empty(rows, dtype=torch.int64, device=weight.device)
    _tie_counts_kernel[(triton.cdiv(rows, 8),)](
        weight, norms, _bytes(zeros, weight), histograms, wanted, ties, rows, columns, weight.stride(0),
        _stride(zeros), HAS_ZEROS=zeros is not None, BINS=_BINS, BR=8, BC=256, num_warps=8,
    )  # fmt: skip
    return ties


def block_mask(
    weight: Tensor, norms: Tensor, zeros: Tensor | None, histograms: Tensor, wanted: Tensor, ties_before: Tensor
) -> Tensor:
    """Return which entries of the leading columns, (c, k), are among the ``wanted`` smallest.

    ``ties_before`` (c,) int64: entries equal to the threshold in earlier rows.
    """
    rows, columns = weight.shape
    mask = torch.empty(rows, columns, dtype=torch.bool, device=weight.device)
    _block_mask_kernel[(triton.cdiv(rows, 8),)](
        weight, norms, _bytes(zeros, weight), histograms, wanted, ties_before, mask.view(torch.int8), rows, columns,
        weight.stride(0), _stride(zeros), HAS_ZEROS=zeros is not None, BINS=_BINS, BR=8, BC=128, num_warps=4,
    )  # fmt: skip
    return mask


def gradient_step(
    direction: Tensor, image: Tensor, mask: Tensor, solution: Tensor, residual: Tensor, energy: Tensor
) -> None:
    """Finish a step of conjugate gradients in place, given ``image`` = direction · matrix; all (c, k), ``energy`` (c,)."""
    rows, columns = direction.shape
    width = triton.next_power_of_2(columns)
    height = max(1, 2048 // width)
    _gradient_step_kernel[(triton.cdiv(rows, height),)](
        direction, image, mask.view(torch.int8), solution, residual, energy, rows, columns,
        BR=height, BC=width, num_warps=4 if width <= 2048 else 8,
    )  # fmt: skip


WIDEST_PANEL = 128
"""Columns that :func:`eliminate` takes at once: a tile of rows stays in registers."""

WIDEST_STEP = 8192
"""Columns that :func:`gradient_step` takes."""


def eliminate(
    weight: Tensor, removed: Tensor, zeros: Tensor, upper: Tensor, dead: Tensor, errors: Tensor, n: int, m: int
) -> None:
    """Run SparseGPT's recursion over a panel, (c, k) with k at most 128, in place; ``errors`` (c, k) takes W_ij / U_jj.

    ``removed`` is given for m = 0, else decided group by group. ``upper`` (k, k) is contiguous.
    """
    rows, columns = weight.shape
    _eliminate_kernel[(triton.cdiv(rows, 16),)](
        weight, removed.view(torch.int8), zeros.view(torch.int8), upper, dead.view(torch.int8), errors, rows, columns,
        weight.stride(0), removed.stride(0), zeros.stride(0), errors.stride(0),
        N=n, M=m, BR=16, BC=triton.next_power_of_2(columns), num_warps=4,
    )  # fmt: skip


def _bytes(zeros: Tensor | None, instead: Tensor) -> Tensor:
    return instead if zeros is None else zeros.view(torch.int8)


def _stride(zeros: Tensor | None) -> int:
    return 0 if zeros is None else zeros.stride(0)
