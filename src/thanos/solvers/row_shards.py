"""The processes that hold the other rows of the same weight, as far as a solver needs to know them.

Rows of a weight are independent but for one thing: which entries are the k smallest of the whole. That is decided by integer
counts alone, and integers add up to the same whatever their order; so rows spread over processes get exactly the mask that
one process would choose. Earlier ranks hold earlier rows.

Everything else about a row is computed from that row alone: products of a matrix's rows with another matrix, which the CPU's
library was measured to give to the last bit whatever rows stand beside them. So with equal statistics the weights, too, are
those of one process.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class RowShards(Protocol):
    """Integer sums over the processes that share a weight's rows. Every process makes the same calls in the same order."""

    @property
    def rank(self) -> int:
        """This process's number, from 0; earlier ranks hold earlier rows."""
        ...

    @property
    def size(self) -> int:
        """How many processes share the rows."""
        ...

    def sum_(self, counts: Tensor) -> Tensor:
        """Replace an integer tensor, in place, by its sum over all processes; return it."""
        ...

    def before(self, counts: Tensor) -> Tensor:
        """Return the sum of an integer tensor over the processes that hold earlier rows; zeros for rank 0."""
        ...

    def gather(self, rows: Tensor, count: int) -> Tensor:
        """Return all ``count`` rows of which this process has those of its :func:`row_range`."""
        ...


class Alone:
    """A process that holds all the rows."""

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
    """Return which of ``count`` items are process ``rank``'s: contiguous whole units, the last with the remainder."""
    units = max(1, count // unit)
    stop = count if rank == size - 1 else units * (rank + 1) // size * unit
    return range(units * rank // size * unit, stop)


ALONE = Alone()
"""The single process."""
