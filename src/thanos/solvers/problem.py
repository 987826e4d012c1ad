"""What passes between ``prune_weight`` and a method: a problem in, a weight and a mask out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from thanos.patterns.nm import NM
from thanos.patterns.parse import Pattern
from thanos.solvers.budget import Budget
from thanos.solvers.hessian import Factor, InputStatistics
from thanos.solvers.row_shards import ALONE, Peers


@dataclass(frozen=True)
class Problem:
    """The rows of one weight that may be pruned, and what is known about their inputs.

    Attributes:
        weight: W without its outlier rows, (c, b), float32 or float64. Methods must not modify it.
        zeros: entries that were zero before and must stay so, (c, b) bool.
        inputs: the statistics of the layer's inputs; None only for methods that need none.
        factor: the factorised damped Hessian; None for methods that need none.
        pattern: which sets of weights may go.
        budget: how many.
        block_size: input columns handled together.
        peers: the processes that hold the other rows; the budget is that of all rows together.
        all_rows: W with their rows too, from which every process chooses the same columns; None if ``weight`` is all.
        zero_free: ``zeros`` is known to hold none; else it is looked at when somebody asks.
    """

    weight: Tensor
    zeros: Tensor
    inputs: InputStatistics | None
    factor: Factor | None
    pattern: Pattern
    budget: Budget
    block_size: int
    peers: Peers = ALONE
    all_rows: Tensor | None = None
    zero_free: bool = False

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yield the column ranges [j1, j2) from left to right; the last may be narrower."""
        columns = self.weight.shape[1]
        for start in range(0, columns, self.block_size):
            yield start, min(start + self.block_size, columns)

    @property
    def whole(self) -> Tensor:
        """The rows of all peers, (c', b)."""
        return self.weight if self.all_rows is None else self.all_rows

    @property
    def upper(self) -> Tensor:
        """U of the factor."""
        assert self.factor is not None
        return self.factor.upper

    @property
    def norms(self) -> Tensor:
        """‖X_j‖₂ up to a common factor, (b,)."""
        assert self.inputs is not None
        return self.inputs.norms

    @cached_property
    def some_zeros(self) -> Tensor | None:
        """``zeros``, or None if there are none: then nobody needs to look."""
        return None if self.zero_free or not bool(self.zeros.any()) else self.zeros

    @property
    def nm(self) -> NM:
        """The n:m pattern."""
        assert isinstance(self.pattern, NM)
        return self.pattern

    def mark_zeros(self, scores: Tensor, start: int = 0) -> Tensor:
        """Give what was zero from the start a score below all others; ``scores`` covers the columns from ``start``."""
        zeros = self.some_zeros
        return scores if zeros is None else scores.masked_fill_(zeros[:, start : start + scores.shape[1]], -1.0)
