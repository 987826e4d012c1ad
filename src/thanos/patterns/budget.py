"""How many entries of a layer are removed, and how many rows stay dense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from thanos.errors import RecipeError

if TYPE_CHECKING:
    from thanos.patterns.base import Pattern


class Settings(Protocol):
    """The settings of a layer that its budget depends on; a :class:`~thanos.recipe.LayerRecipe` has them."""

    @property
    def parsed_pattern(self) -> Pattern: ...  # noqa: D102
    @property
    def resolved_sparsity(self) -> float: ...  # noqa: D102
    @property
    def outlier_rows(self) -> float: ...  # noqa: D102
    @property
    def keep_budget(self) -> bool: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Request:
    """What a pattern plans a budget for.

    Attributes:
        rows: of the weight.
        columns: of the weight.
        sparsity: fraction of all entries to remove, in [0, 1).
        outlier_rows: fraction of the rows that stay dense, in [0, 1).
        keep_budget: whether the other rows make up for them.
    """

    rows: int
    columns: int
    sparsity: float
    outlier_rows: float
    keep_budget: bool


@dataclass(frozen=True, slots=True)
class Budget:
    """How much of one weight matrix is removed, as whole numbers.

    Attributes:
        outlier_rows: q = ⌈α·c⌉, rows left dense; for columns with ``keep_budget`` a few more.
        weights: ⌊p·c·b⌋, entries removed where the pattern leaves the sparsity open.
        columns: ⌈p·b / (1 − α)⌉, columns removed by the columns pattern (math of the paper's Algorithm 2).
        halved_rows: rows that keep only half of the pattern's non-zeros, those with the smallest squared output norm; 0 but
            for n:m with ``keep_budget``.

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
    def plan(cls, rows: int, columns: int, settings: Settings) -> Budget:
        """Work out the budget of a (rows, columns) weight.

        Raises:
            RecipeError: the pattern does not fit the width, or the rows that may be pruned hold too little.
        """
        pattern, p, alpha = settings.parsed_pattern, settings.resolved_sparsity, settings.outlier_rows
        pattern.check_width(columns)
        budget = pattern.budget(Request(rows, columns, p, alpha, settings.keep_budget))
        outliers, halved = budget.outlier_rows, budget.halved_rows
        if p > 0 and (outliers >= rows or pattern.asks_too_much(budget, rows, columns)):
            half = f" and {halved} would keep half" if halved else ""
            raise RecipeError(
                f"sparsity {p:g} with pattern {pattern} and outlier_rows {alpha:g} is impossible for a {rows} × {columns} "
                f"weight: {outliers} of its {rows} rows stay dense{half}; lower sparsity or outlier_rows, or skip this layer"
            )
        return budget
