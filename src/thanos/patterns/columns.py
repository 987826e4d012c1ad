"""The columns pattern: whole input columns are zero."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from thanos.patterns.base import STRAY, Choice, Pattern
from thanos.patterns.budget import Budget, Request
from thanos.patterns.rounding import floor_count

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Columns(Pattern):
    """Whole input columns are removed, from every row that is not an outlier row."""

    whole_columns: ClassVar[bool] = True

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Return the pattern for the text ``columns``, else None."""
        return cls() if text == "columns" else None

    def __str__(self) -> str:
        return "columns"

    def budget(self, request: Request) -> Budget:
        """Return how many columns are removed; :class:`Budget` explains the case of ``keep_budget``."""
        budget, rows, columns = Pattern.budget(self, request), request.rows, request.columns
        if request.keep_budget and 0 < budget.outlier_rows < rows:
            wanted = request.sparsity * rows * columns
            outliers, removed = rows_and_columns(wanted, rows, columns, budget.outlier_rows)
            budget = replace(budget, outlier_rows=outliers, columns=removed)
        return budget

    def asks_too_much(self, budget: Budget, rows: int, columns: int) -> bool:
        """Return whether the budget would remove every column."""
        del rows
        return budget.columns >= columns

    def mask(self, choice: Choice, scores: Tensor, *, by_row: bool = False) -> Tensor:
        """Choose the columns with the smallest scores (b,)."""
        del by_row
        return choice.smallest_columns(scores, choice.budget.columns)

    def violation(self, zero: Tensor) -> str:
        """Describe a violation: no column is zero in every row, or the other columns hold more than stray zeros."""
        whole = zero.all(0)
        if not bool(whole.any()):
            return "no input column is zero in every row"
        stray = zero[:, ~whole].float().mean().item() if bool((~whole).any()) else 0.0
        return f"{100 * stray:.2f} % of the other columns' entries are zero" if stray > STRAY else ""


def rows_and_columns(wanted: float, rows: int, columns: int, outliers: int) -> tuple[int, int]:
    """Return how many rows stay dense, at least ``outliers``, and how many columns the other rows lose.

    Let s = ``wanted`` / (``rows`` − ``outliers``), the entries to remove per other row. There are two choices: ⌊s⌋ columns of
    all other rows, or ⌈s⌉ columns of as many of these rows as ``wanted`` entries need. The choice with the total nearer to
    ``wanted`` is returned; it always keeps a column. But if the whole number nearest to s is all columns, all columns are
    returned, and :meth:`Budget.plan` refuses them.
    """
    others = rows - outliers
    if floor_count(wanted / others + 0.5) >= columns:
        return outliers, columns
    fewer = floor_count(wanted / others)
    choices = [(others, fewer)]
    if fewer + 1 < columns:
        choices.append((max(1, min(others, floor_count(wanted / (fewer + 1) + 0.5))), fewer + 1))
    pruned, removed = min(choices, key=lambda pair: abs(pair[0] * pair[1] - wanted))
    return (rows - pruned, removed) if removed else (outliers, 0)
