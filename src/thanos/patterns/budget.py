"""How many entries of a layer are removed, and how many rows stay dense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from thanos.errors import RecipeError

if TYPE_CHECKING:
    from thanos.patterns.base import Pattern


class Settings(Protocol):
    """The settings of a layer that determine its budget; implemented by :class:`~thanos.recipe.LayerRecipe`."""

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
    """The size of a weight and the settings from which a pattern computes its budget.

    Attributes:
        rows: number of rows of the weight, c.
        columns: number of columns of the weight, b.
        sparsity: fraction of all entries to remove, p, in [0, 1).
        outlier_rows: fraction of the rows that stay dense, α, in [0, 1).
        keep_budget: whether more is removed from the other rows to make up for the outlier rows.
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
        outlier_rows: number of rows left dense, q = ⌈α·c⌉; the columns pattern with ``keep_budget`` may leave a few more.
        weights: number of entries to remove, ⌊p·c·b⌋, for patterns that leave the sparsity open.
        columns: number of columns to remove, ⌈p·b / (1 − α)⌉, for the columns pattern (paper, Algorithm 2).
        halved_rows: number of rows that keep only half of the pattern's non-zeros: the rows with the smallest squared output
            norm. 0 except for n:m with ``keep_budget``.

    With ``keep_budget`` the total equals that of a matrix without outlier rows, ⌊p·c·b⌋ entries or the fraction (m − n)/m, as
    nearly as whole columns and whole rows allow:

    - unstructured: nothing changes, since ⌊p·c·b⌋ counts the entries of all rows already;
    - columns: let s = p·c·b / (c − q). Either all other rows lose ⌊s⌋ columns, or fewer rows lose ⌈s⌉ columns and a few more
      stay dense, whichever is nearer. The total is off by at most half of one row's ⌈s⌉ entries, unless that would leave no
      column;
    - n:m: an outlier row keeps m − n weights per group too many, a halved row n/2 too few. So 2q(m − n)/n rows are halved. For
      2:4 and 4:8 these are 2q rows and the total is exact; otherwise the number is rounded to the nearest whole row.
    """

    outlier_rows: int
    weights: int
    columns: int
    halved_rows: int = 0

    @classmethod
    def plan(cls, rows: int, columns: int, settings: Settings) -> Budget:
        """Return the budget of a (rows, columns) weight.

        Raises RecipeError if the pattern does not fit the width, or the rows that may be pruned hold too few entries.
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
