"""How many entries of a layer are removed, and which rows stay dense."""

from __future__ import annotations

from dataclasses import dataclass

from thanos.errors import RecipeError
from thanos.patterns.columns import Columns, rows_and_columns
from thanos.patterns.nm import NM
from thanos.patterns.rounding import ceil_count, floor_count
from thanos.recipe import LayerRecipe


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
                outliers, removed_columns = rows_and_columns(p * rows * columns, rows, columns, outliers)
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
