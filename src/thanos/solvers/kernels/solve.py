"""Triton kernels for the inner loops whose time is kernel launches rather than arithmetic.

The module that calls a kernel also has the same computation in plain tensor operations. These run without Triton and on other
devices, and the tests compare the two. The only kernel that multiplies matrices does so in full
float32 ("ieee"), never in TF32.

    conjugate_gradients   the whole iteration for a tile of rows (masked_cg.py)
    gradient_step         one step of it without the matrix product, for wider blocks (masked_cg.py)
    eliminate             SparseGPT's recursion over one panel of columns (methods/sparsegpt.py)

The kernels for selection are in :mod:`thanos.solvers.kernels.selection`.
"""

# pyright: reportInvalidTypeForm=false
# Triton needs ``tl.constexpr`` in a signature; without Triton the type checker treats ``tl`` as a variable, not a module.

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


def usable(tensor: Tensor) -> bool:
    """Return whether the kernels can process this tensor: Triton is installed, and it is float32 on CUDA."""
    return triton is not None and tensor.is_cuda and tensor.dtype == torch.float32


def _is_row_major(argument: object) -> bool:
    return not isinstance(argument, Tensor) or argument.dim() < 2 or 1 in (argument.stride(1), argument.shape[1])


def on_its_device(launch: Callable[P, T]) -> Callable[P, T]:
    """Launch on the device of the first argument, since Triton launches on the current device.

    The arguments are checked too: the kernels expect matrices whose rows are contiguous, and read wrong values otherwise.
    """

    @wraps(launch)
    def there(*args: P.args, **kwargs: P.kwargs) -> T:
        assert isinstance(args[0], Tensor)
        assert all(map(_is_row_major, args))
        # The device is nearly always the current one, and this check costs less than a switch.
        if args[0].get_device() == torch.cuda.current_device():
            return launch(*args, **kwargs)
        with torch.cuda.device_of(args[0]):
            return launch(*args, **kwargs)

    return there


if triton is not None:

    @triton.jit
    def _product(scratch, gram, row, column, rows, columns, BR: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
        """Return the product of scratch, a tile (BR, K) of rows, and gram, in full float32."""
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
        # The direction is stored in scratch (in practice the cache), from which the product loads it as an operand.
        row = tl.program_id(0) * BR + tl.arange(0, BR)
        column = tl.arange(0, K)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        wide = row.to(tl.int64)[:, None]
        offset = wide * columns + column[None, :]
        support = tl.load(mask + wide * mask_stride + column[None, :], mask=inside, other=0) != 0
        unit = tl.load(scale + column, mask=column < columns, other=0.0)[None, :]
        w = tl.load(rhs + wide * rhs_stride + column[None, :], mask=inside, other=0.0) * unit
        w = tl.where(support, w, 0.0)
        r = w
        d = w
        x = tl.zeros((BR, K), tl.float32)
        squares = tl.sum(w * w, 1)
        size = squares
        limit = squares * tolerance * tolerance
        step = 0
        going = tl.sum((squares > limit).to(tl.int32), 0)
        while going > 0:
            tl.store(scratch + offset, d, mask=inside)
            tl.debug_barrier()
            image = _product(scratch, gram, row, column, rows, columns, BR, K, BK)
            tl.debug_barrier()
            image = tl.where(support, image, 0.0)
            curvature = tl.sum(d * image, 1)
            # A solved row is not updated any more, so that its result does not depend on the other rows of the tile.
            active = (curvature > 0) & (squares > limit)
            alpha = tl.where(active, squares / tl.where(active, curvature, 1.0), 0.0)
            x += alpha[:, None] * d
            r -= alpha[:, None] * image
            new = tl.sum(r * r, 1)
            d = r + tl.where(squares > 0, new / tl.where(squares > 0, squares, 1.0), 0.0)[:, None] * d
            squares = new
            step += 1
            going = tl.where(step < steps, tl.sum((squares > limit).to(tl.int32), 0), 0)
        tl.store(scratch + offset, x, mask=inside)
        tl.debug_barrier()
        image = _product(scratch, gram, row, column, rows, columns, BR, K, BK)
        rest = tl.where(support, image, 0.0) - w
        bound = backward * (tl.sqrt(size) + tl.load(norm) * tl.sqrt(tl.sum(x * x, 1)))
        good = (squares <= limit) & (tl.sum(rest * rest, 1) <= bound * bound)  # NaN is not good
        tl.store(failed + row, (~good).to(tl.int8), mask=row < rows)
        tl.store(solution + offset, x * unit, mask=inside)

    @triton.jit
    def _gradient_step_kernel(
        direction, image, mask, solution, residual, squares, rows, columns, BR: tl.constexpr, BC: tl.constexpr
    ):
        row = tl.program_id(0) * BR + tl.arange(0, BR)
        column = tl.arange(0, BC)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        offset = row.to(tl.int64)[:, None] * columns + column[None, :]
        d = tl.load(direction + offset, mask=inside, other=0.0)
        support = tl.load(mask + offset, mask=inside, other=0) != 0
        a = tl.where(support, tl.load(image + offset, mask=inside, other=0.0), 0.0)
        old = tl.load(squares + row, mask=row < rows, other=0.0)
        curvature = tl.sum(d * a, 1)
        alpha = tl.where(curvature > 0, old / tl.where(curvature > 0, curvature, 1.0), 0.0)
        tl.store(solution + offset, tl.load(solution + offset, mask=inside) + alpha[:, None] * d, mask=inside)
        r = tl.load(residual + offset, mask=inside, other=0.0) - alpha[:, None] * a
        tl.store(residual + offset, r, mask=inside)
        new = tl.sum(r * r, 1)
        beta = tl.where(old > 0, new / tl.where(old > 0, old, 1.0), 0.0)
        tl.store(direction + offset, r + beta[:, None] * d, mask=inside)
        tl.store(squares + row, new, mask=row < rows)

    @triton.jit
    def _eliminate_kernel(
        weight, removed, zeros, upper, dead, errors, rows, columns, weight_stride, removed_stride, zeros_stride,
        errors_stride, N: tl.constexpr, M: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    ):  # fmt: skip
        # Each program handles a tile of rows, column by column. M = 0: ``removed`` is the mask; else it is chosen by groups.
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
            if M > 0:  # noqa: SIM102, known at compile time
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


WIDEST_SYSTEM = 256
"""Most columns that :func:`conjugate_gradients` accepts: four matrices of a tile of rows stay in registers."""


@on_its_device
def conjugate_gradients(
    gram: Tensor, scale: Tensor, norm: Tensor, rhs: Tensor, mask: Tensor, tolerance: float, backward: float, steps: int
) -> tuple[Tensor, Tensor]:
    """Solve the rows' scaled systems; return x ∘ scale, (c, k), and the mask of the rows that are not solved, (c,) bool.

    ``gram`` (k, k) is scaled to a unit diagonal and contiguous. ``scale`` (k,) holds the scaling factors. ``norm``, 0-d, is an
    upper bound of the norm of ``gram``.
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


@on_its_device
def gradient_step(
    direction: Tensor, image: Tensor, mask: Tensor, solution: Tensor, residual: Tensor, squares: Tensor
) -> None:
    """Finish a step of conjugate gradients in place; ``image`` = direction · matrix. All are (c, k), ``squares`` is (c,)."""
    rows, columns = direction.shape
    width = triton.next_power_of_2(columns)
    height = max(1, 2048 // width)
    _gradient_step_kernel[(triton.cdiv(rows, height),)](
        direction, image, mask.view(torch.int8), solution, residual, squares, rows, columns,
        BR=height, BC=width, num_warps=4 if width <= 2048 else 8,
    )  # fmt: skip


WIDEST_PANEL = 128
"""Most columns that :func:`eliminate` accepts: a tile of rows stays in registers."""

WIDEST_STEP = 8192
"""Most columns that :func:`gradient_step` accepts."""


@on_its_device
def eliminate(
    weight: Tensor, removed: Tensor, zeros: Tensor, upper: Tensor, dead: Tensor, errors: Tensor, n: int, m: int
) -> None:
    """Run SparseGPT's recursion over a panel, (c, k) with k at most 128, in place; write W_ij / U_jj to ``errors`` (c, k).

    For m = 0, ``removed`` is the mask. Otherwise the kernel chooses the mask group by group and writes it to ``removed``.
    ``upper`` (k, k) is contiguous.
    """
    rows, columns = weight.shape
    _eliminate_kernel[(triton.cdiv(rows, 16),)](
        weight, removed.view(torch.int8), zeros.view(torch.int8), upper, dead.view(torch.int8), errors, rows, columns,
        weight.stride(0), removed.stride(0), zeros.stride(0), errors.stride(0),
        N=n, M=m, BR=16, BC=triton.next_power_of_2(columns), num_warps=4,
    )  # fmt: skip
