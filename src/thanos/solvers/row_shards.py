"""Row shards: the rows of one weight, split over several processes.

The rows of a weight are independent, with one exception: the selection of the k smallest entries of the whole weight. Only
integer counts decide it, and an integer sum does not depend on the order of its terms. So all processes together select
exactly the mask that one process would select. Earlier ranks hold earlier rows.

Everything else about a row is computed from that row alone, by products of rows with another matrix. On the CPU, products
were measured to give a row the same bits whichever other rows are multiplied with it (see :data:`ROW_UNIT`). So with equal
statistics the weights, too, equal those of one process.
"""

from __future__ import annotations

import torch
from torch import Tensor


class RowShards:
    """The processes that hold the rows of one weight. This class is a single process, which holds all rows.

    Every process makes the same calls in the same order.

    Attributes:
        rank: number of this process, from 0; earlier ranks hold earlier rows.
        size: number of processes.
    """

    rank = 0
    size = 1

    def sum_(self, counts: Tensor) -> Tensor:
        """Replace an integer tensor, in place, by its sum over all processes; return it."""
        return counts

    def before(self, counts: Tensor) -> Tensor:
        """Return the sum of an integer tensor over the processes that hold earlier rows; zeros for rank 0."""
        return torch.zeros_like(counts)

    def gather(self, rows: Tensor, count: int) -> Tensor:
        """Return all ``count`` rows; ``rows`` are those of this process, see :func:`row_range`."""
        del count
        return rows


ALONE = RowShards()
"""A single process, which holds all rows."""


ROW_UNIT = 16
"""Shards are multiples of 16 rows: BLAS uses another kernel, with another summation order, for a few rows."""


def row_range(count: int, rank: int, size: int, unit: int = ROW_UNIT) -> range:
    """Return the range of the ``count`` items that process ``rank`` holds: whole units; the last rank adds the remainder."""
    units = max(1, count // unit)
    stop = count if rank == size - 1 else units * (rank + 1) // size * unit
    return range(units * rank // size * unit, stop)
