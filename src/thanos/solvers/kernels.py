"""Triton kernels for the inner loops that are short of launches rather than of arithmetic.

Each has a twin in plain tensor operations, where it is called and which the tests compare it with; without Triton, or on
another device, the twin runs. The only kernel that multiplies matrices asks for full float32 ("ieee"), never TF32.

    score_histogram, tie_counts, block_mask   the k-th smallest score and the mask it gives (select.py)
    conjugate_gradients                       the rows' whole iteration, a tile of rows at a time (rows.py)
    gradient_step                             one step of it but for the matrix product, for wider blocks (rows.py)
    eliminate                                 SparseGPT's recursion over one panel of columns (sparsegpt.py)
"""

# pyright: reportInvalidTypeForm=false
# Triton reads ``tl.constexpr`` in a signature; the type checker, here without Triton, takes ``tl`` for a variable.

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

try:
    triton: Any = import_module("triton")
    tl: Any = import_module("triton.language")
except ImportError:  # CPU builds of torch come without it
    triton = tl = None

P = ParamSpec("P")
T = TypeVar("T")

BITS = 11
"""A histogram's digit: 32 bits in three rounds (11 + 11 + 10), and bins that fit a block's registers."""

_BINS = 1 << BITS

_WINDOW = 256
"""Bins of the first round around the last threshold's: counting into few bins is several times as fast as into all."""

_ROWS = 32
"""Rows per program where a program walks along rows."""


def usable(tensor: Tensor) -> bool:
    """Whether the kernels can work on this tensor."""
    return triton is not None and tensor.is_cuda and tensor.dtype == torch.float32


def _where_it_lies(launch: Callable[P, T]) -> Callable[P, T]:
    """Launch on the device of the first argument: Triton launches on the current one, whatever it is handed."""

    @wraps(launch)
    def there(*args: P.args, **kwargs: P.kwargs) -> T:
        assert isinstance(args[0], Tensor)
        # Nearly always the same, and to ask costs less than to switch.
        if args[0].get_device() == torch.cuda.current_device():
            return launch(*args, **kwargs)
        with torch.cuda.device_of(args[0]):
            return launch(*args, **kwargs)

    return there


if triton is not None:

    @triton.jit
    def _keys(
        weight, norms, zeros, rows, columns, row, column, weight_stride, zeros_stride,
        HAS_NORMS: tl.constexpr, HAS_ZEROS: tl.constexpr,
    ):  # fmt: skip
        """Return the ordered bits of a tile's scores, −1's where the weight was zero, and which entries exist."""
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        place = row.to(tl.int64)[:, None] * weight_stride + column[None, :]
        score = tl.load(weight + place, mask=inside, other=0.0) + 0.0  # −0 becomes 0
        if HAS_NORMS:
            score = tl.abs(score) * tl.load(norms + column, mask=column < columns, other=0.0)[None, :]
        key = score.to(tl.int32, bitcast=True)
        if HAS_ZEROS:
            zero = tl.load(zeros + row.to(tl.int64)[:, None] * zeros_stride + column[None, :], mask=inside, other=0)
            key = tl.where(zero != 0, -1082130432, key)  # the bits of −1.0
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
    def _first(histograms, wanted, base, BINS: tl.constexpr, WINDOW: tl.constexpr):
        """Find the first digit: from the window's counts if it lies within, else from the full ones in row 3."""
        found, left, size = _find(histograms, wanted, BINS)
        # The outermost bins of the window stand for everything below and above it.
        missed = (found <= base) | (found >= base + WINDOW - 1)
        if missed:
            found, left, size = _find(histograms + 3 * BINS, wanted, BINS)
        return found, left, size, missed

    @triton.jit
    def _threshold(histograms, wanted, base, BINS: tl.constexpr, WINDOW: tl.constexpr, ROUNDS: tl.constexpr):
        """Return the key's bits found in the first ``ROUNDS`` rounds, how many equals are wanted, and how many there are."""
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
        # A program takes BR rows and strides along them; programs side by side read neighbouring columns. Round 0 counts
        # the first digit within the window, round 3 all of it, if the window turns out to miss.
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
                # What lies outside the matrix goes to the first bin and is taken off again.
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
                    # The last bin holds NaNs only: what lies outside the matrix goes there and is left out below.
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
        # How many entries of each row equal the threshold; only read where not all of them are wanted.
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
        # ``columns`` is the width of the block, whose columns come first among those that were counted.
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
            place = rank[:, None] + tl.cumsum(equal, 1)
            chosen = (key < key_wanted) | ((equal != 0) & (place <= missing))
            chosen = chosen & (wanted_count > 0)
            rank += tl.sum(equal, 1)
            spot = row.to(tl.int64)[:, None] * columns + column[None, :]
            tl.store(mask + spot, chosen.to(tl.int8), mask=inside)

    @triton.jit
    def _product(scratch, gram, row, column, rows, columns, BR: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
        """Return scratch (BR rows of K) times gram, in full float32."""
        result = tl.zeros((BR, K), tl.float32)
        for k in range(0, columns, BK):
            inner = k + tl.arange(0, BK)
            spot = row.to(tl.int64)[:, None] * columns + inner[None, :]
            left = tl.load(scratch + spot, mask=(row < rows)[:, None] & (inner < columns)[None, :], other=0.0)
            there = (inner < columns)[:, None] & (column < columns)[None, :]
            right = tl.load(gram + inner[:, None] * columns + column[None, :], mask=there, other=0.0)
            result += tl.dot(left, right, input_precision="ieee")
        return result

    @triton.jit
    def _conjugate_gradients_kernel(
        gram, scale, norm, rhs, mask, solution, failed, scratch, rows, columns, rhs_stride, mask_stride,
        tolerance, backward, steps, BR: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    ):  # fmt: skip
        # The direction goes through memory (in practice the cache) to become an operand of the product again.
        row = tl.program_id(0) * BR + tl.arange(0, BR)
        column = tl.arange(0, K)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        wide = row.to(tl.int64)[:, None]
        place = wide * columns + column[None, :]
        support = tl.load(mask + wide * mask_stride + column[None, :], mask=inside, other=0) != 0
        unit = tl.load(scale + column, mask=column < columns, other=0.0)[None, :]
        w = tl.load(rhs + wide * rhs_stride + column[None, :], mask=inside, other=0.0) * unit
        w = tl.where(support, w, 0.0)
        r = w
        d = w
        x = tl.zeros((BR, K), tl.float32)
        energy = tl.sum(w * w, 1)
        size = energy
        limit = energy * tolerance * tolerance
        step = 0
        going = tl.sum((energy > limit).to(tl.int32), 0)
        while going > 0:
            tl.store(scratch + place, d, mask=inside)
            tl.debug_barrier()
            image = _product(scratch, gram, row, column, rows, columns, BR, K, BK)
            tl.debug_barrier()
            image = tl.where(support, image, 0.0)
            curvature = tl.sum(d * image, 1)
            # A row that is done stays as it is, so that its result does not depend on the rows beside it.
            active = (curvature > 0) & (energy > limit)
            alpha = tl.where(active, energy / tl.where(active, curvature, 1.0), 0.0)
            x += alpha[:, None] * d
            r -= alpha[:, None] * image
            new = tl.sum(r * r, 1)
            d = r + tl.where(energy > 0, new / tl.where(energy > 0, energy, 1.0), 0.0)[:, None] * d
            energy = new
            step += 1
            going = tl.where(step < steps, tl.sum((energy > limit).to(tl.int32), 0), 0)
        tl.store(scratch + place, x, mask=inside)
        tl.debug_barrier()
        image = _product(scratch, gram, row, column, rows, columns, BR, K, BK)
        rest = tl.where(support, image, 0.0) - w
        bound = backward * (tl.sqrt(size) + tl.load(norm) * tl.sqrt(tl.sum(x * x, 1)))
        good = (energy <= limit) & (tl.sum(rest * rest, 1) <= bound * bound)  # NaN is not good
        tl.store(failed + row, (~good).to(tl.int8), mask=row < rows)
        tl.store(solution + place, x * unit, mask=inside)

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
                    score = tl.where(alive[None, :], tl.abs(w) / diagonal[None, :], 0.0)
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


@_where_it_lies
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
        weight: (c, k) float32, rows contiguous.
        norms: (k,); None if ``weight`` holds scores already.
        zeros: entries whose score is −1, (c, k) bool; None if there are none.
        histograms: of the rounds; the earlier ones are complete.
        wanted: k of the k-th smallest, 0-d int64.
        window: where the first digit is looked for first, 0-d int32.
        round_: 0 (the first digit within the window), 3 (all of it, if that missed), 1 or 2, in this order.
    """
    rows, columns = weight.shape
    tile = 128
    grid = (triton.cdiv(rows, _ROWS), min(8, triton.cdiv(columns, tile)))
    _histogram_kernel[grid](
        weight, _or(norms, weight), _bytes(zeros, weight), histograms, wanted, window, rows, columns,
        weight.stride(0), _stride(zeros), HAS_NORMS=norms is not None, HAS_ZEROS=zeros is not None, ROUND=round_,
        BINS=_BINS, WINDOW=_WINDOW, BR=_ROWS, BC=tile, num_warps=8,
    )  # fmt: skip


@_where_it_lies
def tie_counts(
    weight: Tensor, norms: Tensor | None, zeros: Tensor | None, histograms: Tensor, wanted: Tensor, window: Tensor
) -> Tensor:
    """Return per row, (c,) int64, how many scores equal the k-th smallest; zeros where all of them are wanted anyway."""
    rows, columns = weight.shape
    ties = torch.empty(rows, dtype=torch.int64, device=weight.device)
    _tie_counts_kernel[(triton.cdiv(rows, 8),)](
        weight, _or(norms, weight), _bytes(zeros, weight), histograms, wanted, window, ties, rows, columns,
        weight.stride(0), _stride(zeros), HAS_NORMS=norms is not None, HAS_ZEROS=zeros is not None,
        BINS=_BINS, WINDOW=_WINDOW, BR=8, BC=256, num_warps=8,
    )  # fmt: skip
    return ties


@_where_it_lies
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
    """Return which entries of the leading columns, (c, k), are among the ``wanted`` smallest.

    ``ties_before`` (c,) int64: entries equal to the threshold in earlier rows. ``following`` takes the window that the
    threshold suggests for the next search.
    """
    rows, columns = weight.shape
    mask = torch.empty(rows, columns, dtype=torch.bool, device=weight.device)
    _block_mask_kernel[(triton.cdiv(rows, 8),)](
        weight, _or(norms, weight), _bytes(zeros, weight), histograms, wanted, window, following, ties_before,
        mask.view(torch.int8), rows, columns, weight.stride(0), _stride(zeros), HAS_NORMS=norms is not None,
        HAS_ZEROS=zeros is not None, BINS=_BINS, WINDOW=_WINDOW, BR=8, BC=128, num_warps=4,
    )  # fmt: skip
    return mask


WIDEST_SYSTEM = 256
"""Columns that :func:`conjugate_gradients` takes: a tile of rows, four matrices of it, stays in registers."""


@_where_it_lies
def conjugate_gradients(
    gram: Tensor, scale: Tensor, norm: Tensor, rhs: Tensor, mask: Tensor, tolerance: float, backward: float, steps: int
) -> tuple[Tensor, Tensor]:
    """Solve the rows' scaled systems to the end; return x ∘ scale (c, k), and which rows are not solved (c,) bool.

    ``gram`` (k, k) is scaled to a unit diagonal and contiguous, ``scale`` (k,) is how, ``norm`` 0-d bounds its norm.
    """
    rows, columns = rhs.shape
    width = max(16, triton.next_power_of_2(columns))
    solution, scratch = torch.empty(2, rows, columns, device=rhs.device)
    failed = torch.empty(rows, dtype=torch.bool, device=rhs.device)
    _conjugate_gradients_kernel[(triton.cdiv(rows, 32),)](
        gram, scale, norm, rhs, mask.view(torch.int8), solution, failed.view(torch.int8), scratch, rows, columns,
        rhs.stride(0), mask.stride(0), tolerance, backward, steps,
        BR=32, K=width, BK=min(32, width), num_warps=4 if width <= 128 else 8,
    )  # fmt: skip
    return solution, failed


@_where_it_lies
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


@_where_it_lies
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


def _or(tensor: Tensor | None, instead: Tensor) -> Tensor:
    # Triton wants a pointer though the kernel will not use it.
    return instead if tensor is None else tensor


def _bytes(zeros: Tensor | None, instead: Tensor) -> Tensor:
    return instead if zeros is None else zeros.view(torch.int8)


def _stride(zeros: Tensor | None) -> int:
    return 0 if zeros is None else zeros.stride(0)
