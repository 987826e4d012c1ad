"""Whole input columns are zero."""

from __future__ import annotations

from dataclasses import dataclass

from thanos.patterns.rounding import floor_count


@dataclass(frozen=True, slots=True)
class Columns:
    """Whole input columns are removed, from every row that is not an outlier row."""

    group: int = 1
    sparsity: None = None

    def __str__(self) -> str:
        return "columns"

    def check_width(self, columns: int) -> None:
        """Any width will do."""

    def check_block_size(self, block_size: int) -> None:
        """Any block size will do."""


def rows_and_columns(wanted: float, rows: int, columns: int, outliers: int) -> tuple[int, int]:
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
