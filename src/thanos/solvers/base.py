"""What passes between ``prune_weight`` and a method: a problem in, a weight and a mask out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from thanos.errors import RecipeError
from thanos.patterns import NM, Columns, Pattern
from thanos.recipe import LayerRecipe
from thanos.solvers.factor import Factor, InputStatistics
from thanos.solvers.peers import ALONE, Peers

_SLACK = 1e-9
"""Keeps ⌊0.29 · 100⌋ at 29: a product that misses a whole number by rounding alone counts as that number."""


def floor_count(value: float) -> int:
    """Return ⌊value⌋, forgiving rounding in the product that made it."""
    return math.floor(value + _SLACK * max(1.0, value))


def ceil_count(value: float) -> int:
    """Return ⌈value⌉, forgiving rounding in the product that made it."""
    return math.ceil(value - _SLACK * max(1.0, value))


@dataclass(frozen=True, slots=True)
class Budget:
    """How much of one weight matrix is removed, as whole numbers.

    Attributes:
        outlier_rows: q = ⌈α·c⌉, rows left dense; for columns with ``keep_budget`` a few more.
        weights: ⌊p·c·b⌋, entries removed by the unstructured pattern.
        columns: ⌈p·b / (1 − α)⌉, columns removed by the columns pattern (math of the paper's Algorithm 2).
        halved_rows: rows that keep only n/2 of m, those with the least output energy; 0 but for n:m with ``keep_budget``.

    With ``keep_budget`` the total is that of a matrix without outlier rows, ⌊p·c·b⌋ or (m − n)/m, as nearly as whole columns
    and whole rows allow:

    - unstructured: nothing changes, since ⌊p·c·b⌋ counts the entries of all rows already;
    - columns: with s = p·c·b / (c − q), ⌊s⌋ columns go from the other rows, or, where that is nearer, ⌈s⌉ columns from as many
      of them as it takes, a few more staying dense: the total is off by half of one row's ⌈s⌉ entries at most, unless that
      would leave no column;
    - n:m: an outlier row keeps m − n weights a group too many, a halved row n/2 fewer: 2q(m − n)/n rows are halved, which is
      2q for 2:4 and 4:8 and makes the total exact; else to the nearest whole row.
    """

    outlier_rows: int
    weights: int
    columns: int
    halved_rows: int = 0

    @classmethod
    def plan(cls, rows: int, columns: int, recipe: LayerRecipe) -> Budget:
        """Work out the budget of a (rows, columns) weight.

        Raises:
            RecipeError: the pattern does not fit the width, or the rows that may be pruned hold too little.
        """
        pattern, p, alpha = recipe.parsed_pattern, recipe.resolved_sparsity, recipe.outlier_rows
        pattern.check_width(columns)
        outliers = ceil_count(alpha * rows)
        removed_columns, halved = ceil_count(p * columns / (1 - alpha)), 0
        if recipe.keep_budget and 0 < outliers < rows:
            if isinstance(pattern, Columns):
                outliers, removed_columns = _rows_and_columns(p * rows * columns, rows, columns, outliers)
            if isinstance(pattern, NM):
                halved = floor_count(2 * outliers * (pattern.m - pattern.n) / pattern.n + 0.5)
        budget = cls(outliers, floor_count(p * rows * columns), removed_columns, halved)
        too_many = (
            budget.columns >= columns
            if isinstance(pattern, Columns)
            else budget.weights > (rows - outliers) * columns
            if pattern.sparsity is None
            else outliers + halved > rows
        )
        if (too_many and p > 0) or (outliers >= rows and p > 0):
            half = f" and {halved} would keep half" if halved else ""
            raise RecipeError(
                f"sparsity {p:g} with pattern {pattern} and outlier_rows {alpha:g} is impossible for a {rows} × {columns} "
                f"weight: {outliers} of its {rows} rows stay dense{half}; lower sparsity or outlier_rows, or skip this layer"
            )
        return budget


def _rows_and_columns(wanted: float, rows: int, columns: int, outliers: int) -> tuple[int, int]:
    """Return how many rows stay dense, ``outliers`` or more, and how many columns the others lose.

    Of ⌊s⌋ columns of all the other rows and ⌈s⌉ columns of as many of them as ``wanted`` entries take, whichever is nearer;
    s is ``wanted`` per other row. Some column always stays; where even the nearest number of columns leaves none, all go, which
    :meth:`Budget.plan` refuses.
    """
    others = rows - outliers
    if floor_count(wanted / others + 0.5) >= columns:
        return outliers, columns
    fewer = floor_count(wanted / others)
    found = [(others, fewer)]
    if fewer + 1 < columns:
        found.append((max(1, min(others, floor_count(wanted / (fewer + 1) + 0.5))), fewer + 1))
    pruned, removed = min(found, key=lambda pair: abs(pair[0] * pair[1] - wanted))
    return (rows - pruned, removed) if removed else (outliers, 0)


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


def column_mask(scores: Tensor, count: int, rows: int) -> Tensor:
    """Remove the ``count`` columns with the smallest scores (b,) from all ``rows`` rows."""
    from thanos.solvers.select import smallest_mask

    return smallest_mask(scores, count).expand(rows, -1).clone()
