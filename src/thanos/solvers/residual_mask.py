"""Thanos' residual masks: at each block, the smallest scores among all columns that remain.

The block loses those of the selected entries that lie within its columns. The rest of the budget goes to the columns on its
right, whose weights the block's update has changed by then.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from thanos.solvers.kernels import solve as kernels
from thanos.solvers.row_selection import smallest_of_rows
from thanos.solvers.row_shards import ALONE, RowShards
from thanos.solvers.selection import KernelSearch, kth_on_cpu, smallest_mask


class Residual(Protocol):
    """A selection that removes the whole budget, block by block from left to right."""

    def take(self, weight: Tensor, start: int, stop: int) -> Tensor:
        """Return the mask, (c, stop − start) bool, of the entries to remove from columns [start, stop) of the current W."""
        ...


class ResidualMask:
    """Thanos' global residual mask: one budget for all rows.

    For each block it selects the smallest scores among all columns that remain; the block loses those within its columns.

    Args:
        norms: ‖X_j‖₂ of all columns, (b,).
        zeros: mask of the entries whose score is below all others, (c, b) bool; None if there are none.
        budget: number of entries to remove, over all processes: a 0-d integer tensor. A copy of it is counted down on its
            device, not by the host.
        row_shards: the processes that hold the other rows.
    """

    def __init__(self, norms: Tensor, zeros: Tensor | None, budget: Tensor, row_shards: RowShards = ALONE) -> None:
        self._norms, self._zeros, self._left, self._row_shards = norms, zeros, budget.clone(), row_shards
        self._search = KernelSearch(row_shards)
        self._scratch: Tensor | None = None

    def take(self, weight: Tensor, start: int, stop: int) -> Tensor:
        """Return the mask, (c, stop − start) bool, of the entries to remove from columns [start, stop) of the current W."""
        if kernels.usable(weight):
            zeros = None if self._zeros is None else self._zeros[:, start:]
            rest, norms = weight[:, start:], self._norms[start:]
            chosen = self._search.smallest(rest, norms, zeros, self._left, stop - start)
        else:
            chosen = self._by_scores(weight[:, start:], start, stop - start)
        self._left -= self._row_shards.sum_(torch.count_nonzero(chosen))
        return chosen

    def _by_scores(self, rest: Tensor, start: int, width: int) -> Tensor:
        scores = self._scores(rest, start)
        if rest.device.type != "cpu" or self._row_shards.size > 1:
            return smallest_mask(scores, self._left, self._row_shards)[:, :width]
        left, block = int(self._left), scores[:, :width]
        if not 0 < left < scores.numel():
            return torch.full(block.shape, left > 0, dtype=torch.bool)
        threshold, equals, missing = kth_on_cpu(scores, left)
        return block <= threshold if equals == missing else smallest_mask(scores, left)[:, :width]

    def _scores(self, rest: Tensor, start: int) -> Tensor:
        if self._scratch is None:
            self._scratch = torch.empty(rest.numel(), dtype=rest.dtype, device=rest.device)
        scores = self._scratch[: rest.numel()].view(rest.shape)
        torch.mul(rest, self._norms[start:], out=scores).abs_()
        return scores if self._zeros is None else scores.masked_fill_(self._zeros[:, start:], -1.0)


class RowResidualMask:
    """The residual mask with one budget for each row: a row's smallest scores among its remaining columns.

    A row has at least as many columns left as entries to remove, since the selected entries that are not in the block are on
    its right. So after the last block every row has lost exactly its budget.

    Args:
        norms: ‖X_j‖₂ of all columns, (b,).
        zeros: mask of the entries whose score is below all others, (c, b) bool; None if there are none.
        budgets: number of entries to remove from each row of this process, (c,) int64. A copy of it is counted down.
    """

    def __init__(self, norms: Tensor, zeros: Tensor | None, budgets: Tensor) -> None:
        self._norms, self._zeros, self._left = norms, zeros, budgets.clone()

    def take(self, weight: Tensor, start: int, stop: int) -> Tensor:
        """See :class:`Residual`."""
        zeros = None if self._zeros is None else self._zeros[:, start:]
        chosen = smallest_of_rows(weight[:, start:], self._norms[start:], zeros, self._left, stop - start)
        self._left -= chosen.sum(1)
        return chosen
