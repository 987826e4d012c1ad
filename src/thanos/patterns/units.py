"""Patterns that remove whole units of a model, neurons or heads, so that the model becomes smaller.

A unit is a set of input columns of one layer, its writer: the layer that carries the unit's output into the residual stream.
All units of a writer have the same number of columns. The columns are divided into groups, and in every group each unit has one
run of consecutive columns. So the columns are ordered by group, unit and position in the run. The engine sets the columns of a
removed unit to zero; the model is made smaller at the end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from thanos.errors import RecipeError
from thanos.patterns.base import Choice, Pattern
from thanos.patterns.budget import Budget, Request
from thanos.patterns.rounding import floor_count

if TYPE_CHECKING:
    from torch import Tensor

NEURONS = "neurons"
"""A column of the second matrix of an MLP."""

HEADS = "heads"
"""Columns of the attention's output matrix: an attention head, or several that are removed together."""

BLOCKS = "blocks"
"""A decoder block."""


@dataclass(frozen=True, slots=True)
class ModelUnits(Pattern):
    """Whole units of a model are removed; the base of such patterns."""

    default_sparsity: ClassVar[float] = 0.2
    whole_columns: ClassVar[bool] = True
    can_be_required: ClassVar[bool] = False

    def check_block_size(self, block_size: int) -> None:
        """Refuse any block size: units are chosen among all columns of a layer at once."""
        raise RecipeError(
            f"block_size {block_size} has no meaning for pattern {self}, which works on all columns of a layer at once; leave "
            "block_size out"
        )

    def violation(self, zero: Tensor) -> str:
        """Return an empty text: the smaller model has no zeros that could violate the pattern."""
        del zero
        return ""


@dataclass(frozen=True, slots=True)
class Units(ModelUnits):
    """Units of one kind are removed.

    Attributes:
        count: number of units of the writer; 0 if every column is a unit.
        groups: number of runs of columns of each unit.
    """

    count: int = 0
    groups: int = 1

    kind: ClassVar[str]
    """The kind of the units."""

    def of_writer(self, count: int, groups: int) -> Self:
        """Return the pattern of a writer with this number of units, each with this number of runs of columns."""
        return replace(self, count=count, groups=groups)

    def layout(self, columns: int) -> tuple[int, int, int]:
        """Return the numbers of groups, of units, and of columns in a run; their product is ``columns``."""
        count = self.count or columns
        return self.groups, count, columns // (self.groups * count)

    def check_width(self, columns: int) -> None:
        """Refuse a number of columns that the units do not fill evenly."""
        count = self.count or columns
        if columns % (self.groups * count):
            raise RecipeError(
                f"pattern {self} does not fit {columns} input columns: they are not divisible by {self.groups * count}"
            )

    def budget(self, request: Request) -> Budget:
        """Return how many columns are removed: the columns of sparsity · units, rounded to whole units."""
        groups, count, run = self.layout(request.columns)
        units = floor_count(request.sparsity * count + 0.5)
        weights = floor_count(request.sparsity * request.rows * request.columns)
        return Budget(outlier_rows=0, weights=weights, columns=units * groups * run)

    def asks_too_much(self, budget: Budget, rows: int, columns: int) -> bool:
        """Return whether the budget would remove every unit."""
        del rows
        return budget.columns >= columns

    def unit_scores(self, scores: Tensor) -> Tensor:
        """Return the scores of the units, (units,): the sums of the scores of their columns, (b,)."""
        return scores.view(self.layout(len(scores))).sum((0, 2))

    def columns_of(self, units: Tensor, columns: int) -> Tensor:
        """Return a mask of the columns, (b,) bool, from a mask of the units, (units,)."""
        groups, _, run = self.layout(columns)
        return units[None, :, None].expand(groups, -1, run).reshape(-1)

    def members(self, column_numbers: Tensor) -> Tensor:
        """Return the columns of each unit, (units, columns of a unit), from the numbers of all columns, 0 to b − 1."""
        _, count, _ = self.layout(len(column_numbers))
        return column_numbers.view(self.layout(len(column_numbers))).transpose(0, 1).reshape(count, -1)

    def removed_units(self, gone: Tensor, sparsity: float) -> list[int]:
        """Return the indices of the removed units, ascending, from the mask of the columns that are all zero, (b,) bool.

        Some columns may have been zero before pruning. Then more units than planned may be all zero. The first of them are
        returned, since all zero units are equivalent.
        """
        _, count, _ = self.layout(len(gone))
        whole = gone.view(self.layout(len(gone))).transpose(0, 1).reshape(count, -1).all(1)
        return whole.nonzero().squeeze(1).tolist()[: floor_count(sparsity * count + 0.5)]

    def mask(self, choice: Choice, scores: Tensor, *, by_row: bool = False) -> Tensor:
        """Choose the columns of the units with the smallest sums of scores; ``scores`` are those of the columns, (b,)."""
        del by_row
        groups, _, run = self.layout(len(scores))
        units = choice.smallest_columns(self.unit_scores(scores), choice.budget.columns // (groups * run))
        return self.columns_of(units, len(scores))
