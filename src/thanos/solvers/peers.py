"""The processes that hold the other rows of the same weight, as far as a solver needs to know them.

Rows of a weight are independent but for one thing: which entries are the k smallest of the whole. That is decided by integer
counts alone, and integers add up to the same whatever their order; so rows spread over processes get exactly the mask that
one process would choose. Earlier ranks hold earlier rows.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Peers(Protocol):
    """Integer sums over the processes that share a weight's rows. Every process makes the same calls in the same order."""

    @property
    def rank(self) -> int:
        """This process's place among ``size``; earlier ranks hold earlier rows."""
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


ALONE = Alone()
"""The single process."""
