"""A Triton kernel for the smallest scores of each row.

One program searches one row. The bits of the k-th smallest score are found from the highest to the lowest, each by counting the
scores below a trial value; the row stays in registers or in the cache. Plain tensor operations for the same selection are in
:mod:`thanos.solvers.row_selection`.
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

_TILES = (1024, 4096, 16384)
"""Columns that a program holds at once. A wider row is read again for every bit."""


if triton is not None:

    @triton.jit
    def _row_keys(weight, norms, zeros, columns, column, HAS_ZEROS: tl.constexpr):
        """Return the ordered bits of a row's scores: −1 at ``zeros``; beyond the last column a number above all scores."""
        inside = column < columns
        score = tl.abs(tl.load(weight + column, mask=inside, other=0.0)) * tl.load(
            norms + column, mask=inside, other=0.0
        )
        key = score.to(tl.int32, bitcast=True)
        if HAS_ZEROS:
            key = tl.where(tl.load(zeros + column, mask=inside, other=0) != 0, -1, key)
        return tl.where(inside, key, 2147483647)

    @triton.jit
    def _row_mask_kernel(
        weight, norms, zeros, counts, mask, columns, width, weight_stride, zeros_stride,
        HAS_ZEROS: tl.constexpr, WHOLE: tl.constexpr, BC: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        weight += row * weight_stride
        zeros += row * zeros_stride
        wanted = tl.load(counts + row).to(tl.int32)
        tile = tl.arange(0, BC)
        held = _row_keys(weight, norms, zeros, columns, tile, HAS_ZEROS)
        # The largest value with fewer than ``wanted`` keys below it is the ``wanted``-th smallest key. No trial exceeds
        # 2³¹ − 2.
        found = -1
        for step in range(31):
            trial = found + (1 << (30 - step))
            below = (held < trial).to(tl.int32)
            if not WHOLE:
                for start in range(BC, columns, BC):
                    key = _row_keys(weight, norms, zeros, columns, start + tile, HAS_ZEROS)
                    below += (key < trial).to(tl.int32)
            found = tl.where(tl.sum(below, 0) < wanted, trial, found)
        below = (held < found).to(tl.int32)
        if not WHOLE:
            for start in range(BC, columns, BC):
                key = _row_keys(weight, norms, zeros, columns, start + tile, HAS_ZEROS)
                below += (key < found).to(tl.int32)
        missing = wanted - tl.sum(below, 0)
        ties = 0
        for start in range(0, width, BC):
            column = start + tile
            key = _row_keys(weight, norms, zeros, columns, column, HAS_ZEROS)
            equal = (key == found).to(tl.int32)
            position = ties + tl.cumsum(equal, 0)
            ties += tl.sum(equal, 0)
            chosen = ((key < found) | ((equal != 0) & (position <= missing))) & (wanted > 0)
            tl.store(mask + row * width + column, chosen.to(tl.int8), mask=column < width)


@on_its_device
def row_mask(weight: Tensor, norms: Tensor, zeros: Tensor | None, counts: Tensor, width: int) -> Tensor:
    """Return the mask of the ``counts`` smallest scores |W_ij|·norm_j of each row, in the first ``width`` columns.

    Args:
        weight: the columns to search, (c, k) float32, rows contiguous.
        norms: factors of the columns, (k,) float32, contiguous.
        zeros: mask of the entries that are selected first, (c, k) bool; None if there are none.
        counts: number of entries to select in each row, (c,) int64, between 0 and k.
        width: number of columns in the mask.
    """
    rows, columns = weight.shape
    mask = torch.empty(rows, width, dtype=torch.bool, device=weight.device)
    if rows == 0:
        return mask
    tile = next((size for size in _TILES if size >= columns), _TILES[1])
    _row_mask_kernel[(rows,)](
        weight, norms, weight if zeros is None else zeros.view(torch.int8), counts, mask.view(torch.int8), columns, width,
        weight.stride(0), 0 if zeros is None else zeros.stride(0), HAS_ZEROS=zeros is not None, WHOLE=tile >= columns,
        BC=tile, num_warps=4 if tile == _TILES[0] else 8 if tile == _TILES[1] else 16,
    )  # fmt: skip
    return mask
