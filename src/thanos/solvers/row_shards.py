"""Row shards: the rows of one weight, split over several processes.

The rows of a weight are independent, with one exception: the selection of the k smallest entries of the whole weight. Only
integer counts decide it, and an integer sum does not depend on the order of its terms. So all processes together select
exactly the mask that one process would select. Earlier ranks hold earlier rows.

Everything else about a row is computed from that row alone, by products of rows with another matrix. On the CPU, products
were measured to give a row the same bits whichever other rows are multiplied with it (see :data:`ROW_UNIT`). So with equal
statistics the weights, too, equal those of one process.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class RowShards(Protocol):
    """The collective operations of the processes that hold the rows of one weight.

    Every process makes the same calls in the same order.
    """

    @property
    def rank(self) -> int:
        """The number of this process, from 0; earlier ranks hold earlier rows."""
        ...

    @property
    def size(self) -> int:
        """The number of processes that hold the rows."""
        ...

    def sum_(self, counts: Tensor) -> Tensor:
        """Replace an integer tensor, in place, by its sum over all processes; return it."""
        ...

    def before(self, counts: Tensor) -> Tensor:
        """Return the sum of an integer tensor over the processes that hold earlier rows; zeros for rank 0."""
        ...

    def gather(self, rows: Tensor, count: int) -> Tensor:
        """Return all ``count`` rows; ``rows`` are those of this process, see :func:`row_range`."""
        ...


class Alone:
    """The :class:`RowShards` of a single process, which holds all rows."""

    rank = 0
    size = 1

    def sum_(self, counts: Tensor) -> Tensor:
        """Return ``counts`` as it is."""
        return counts

    def before(self, counts: Tensor) -> Tensor:
        """Return zeros."""
        return counts.new_zeros(counts.shape)

    def gather(self, rows: Tensor, count: int) -> Tensor:
        """Return ``rows`` as they are."""
        del count
        return rows


ROW_UNIT = 16
"""Shards are multiples of 16 rows: BLAS uses another kernel, with another summation order, for a few rows."""


def row_range(count: int, rank: int, size: int, unit: int = ROW_UNIT) -> range:
    """Return the range of the ``count`` items that process ``rank`` holds: whole units; the last rank adds the remainder."""
    units = max(1, count // unit)
    stop = count if rank == size - 1 else units * (rank + 1) // size * unit
    return range(units * rank // size * unit, stop)


ALONE = Alone()
"""The one instance of :class:`Alone`."""
