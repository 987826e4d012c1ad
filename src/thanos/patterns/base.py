"""The interface of a sparsity pattern, and the selections over a weight's rows that it uses.

A pattern defines which sets of entries may be zero. Three attributes decide how a method applies it:

- ``any_entries``: any set of ``budget.weights`` entries is allowed, so a method may choose them block by block;
- ``group_zeros`` > 0: every ``group`` consecutive entries of a row lose ``group_zeros`` entries. The groups are independent,
  so a method may decide a group when it reaches it;
- ``whole_columns``: every row loses the same columns, chosen by one score per column.

If none of the three applies, :meth:`Pattern.mask` decides once, on the scores of the whole weight.

A pattern with ``unit_kinds`` removes whole units of a model, see :mod:`thanos.patterns.units`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

from thanos.errors import RecipeError
from thanos.patterns.budget import Budget, Request
from thanos.patterns.rounding import ceil_count, floor_count

if TYPE_CHECKING:
    from torch import Tensor

STRAY = 0.01
"""Largest fraction of zeros that a dense row, or a column that is kept, may hold by chance: 16-bit weights have a few."""


class Choice(Protocol):
    """The budget, and the selections over all rows; implemented by :class:`~thanos.solvers.problem.Problem`.

    The rows of a weight, (c, b), may be split over processes. The functions count over all processes, and every process must
    call them in the same order.
    """

    @property
    def budget(self) -> Budget:
        """The budget of all rows together."""
        ...

    def smallest(self, scores: Tensor, count: int | Tensor) -> Tensor:
        """Return a bool mask, (c, b), with ``count`` True over all rows, at the smallest scores (c, b)."""
        ...

    def smallest_of_each_row(self, scores: Tensor, count: int) -> Tensor:
        """Return a bool mask with ``count`` True over all rows, the same number in each row as far as possible.

        The counts of two rows differ by at most one, unless a row has more entries with the score −1.
        """
        ...

    def smallest_of_each_group(self, scores: Tensor, count: int, group: int) -> Tensor:
        """Return a bool mask with ``count`` True in every ``group`` consecutive entries of a row."""
        ...

    def smallest_columns(self, scores: Tensor, count: int) -> Tensor:
        """Return a bool mask, (b,), with ``count`` True. The scores, (b,), must be the same on every process."""
        ...

    def total(self, counts: Tensor) -> Tensor:
        """Sum an integer tensor in place over the processes that hold the rows; return it."""
        ...


class Pattern(ABC):
    """A sparsity pattern. Subclasses are frozen dataclasses, so that two objects of the same pattern are equal."""

    __slots__ = ()

    default_sparsity: ClassVar[float] = 0.5
    """Fraction of weights to remove if neither the pattern nor the recipe sets it."""

    any_entries: ClassVar[bool] = False
    """Whether any set of entries may be zero."""

    whole_columns: ClassVar[bool] = False
    """Whether every row loses the same columns."""

    unit_kinds: ClassVar[tuple[str, ...]] = ()
    """The kinds of units that the pattern removes, so that the model becomes smaller; empty if it only sets weights to zero."""

    keeps_all: ClassVar[bool] = False
    """Whether the pattern removes no entry of any layer."""

    can_be_required: ClassVar[bool] = True
    """Whether a matrix with zeros can violate the pattern, so that ``inspect --require`` makes sense."""

    @classmethod
    @abstractmethod
    def parse(cls, text: str) -> Self | None:
        """Return the pattern of this class that a text names; None if the text names none.

        Raises RecipeError if the text names an impossible pattern.
        """

    @abstractmethod
    def __str__(self) -> str:
        """Return the text that :meth:`parse` reads."""

    @property
    def group(self) -> int:
        """Number of consecutive inputs that are decided together. No block of columns cuts such a group."""
        return 1

    @property
    def group_zeros(self) -> int:
        """Number of entries that every group of a row loses; 0 for patterns without groups."""
        return 0

    @property
    def sparsity(self) -> float | None:
        """Fraction of weights that the pattern removes; None if the recipe sets it."""
        return None

    def check_width(self, columns: int) -> None:  # noqa: B027, any width will do
        """Raise RecipeError for a number of input columns that the pattern does not fit."""

    def check_block_size(self, block_size: int) -> None:  # noqa: B027, any block size will do
        """Raise RecipeError for a block size that would cut a group in two."""

    def check_keep_budget(self, outlier_rows: float) -> None:
        """Refuse ``keep_budget`` if the other rows cannot make up for this fraction of outlier rows, above 0.

        Raises RecipeError if they cannot, for example because the pattern fixes the number of entries that each row loses.
        """
        del outlier_rows
        if self.sparsity is not None:
            raise RecipeError(
                f"pattern {self} fixes what each row loses, so no row can make up for outlier rows; leave keep_budget out"
            )

    def budget(self, request: Request) -> Budget:
        """Return how much of a weight is removed; :class:`Budget` has the formulas."""
        p, rows, columns = request.sparsity, request.rows, request.columns
        return Budget(
            outlier_rows=ceil_count(request.outlier_rows * rows),
            weights=floor_count(p * rows * columns),
            columns=ceil_count(p * columns / (1 - request.outlier_rows)),
        )

    def asks_too_much(self, budget: Budget, rows: int, columns: int) -> bool:
        """Return whether the rows that may be pruned have too few entries, or are too few, for a budget."""
        if self.sparsity is None:
            return budget.weights > (rows - budget.outlier_rows) * columns
        return budget.outlier_rows + budget.halved_rows > rows

    def halved(self) -> Pattern:
        """Return the pattern of the ``budget.halved_rows`` rows that keep only half of the non-zeros."""
        return self

    @abstractmethod
    def mask(self, choice: Choice, scores: Tensor, *, by_row: bool = False) -> Tensor:
        """Choose the entries to remove.

        Args:
            choice: the budget, and selections over all rows.
            scores: scores of the entries, (c, b), at least 0; the smallest are removed first. −1 marks an entry that is zero
                already and must stay zero. With ``whole_columns``: scores of the columns, (b,).
            by_row: whether the method compares scores within a row only; ignored by patterns for which this makes no
                difference.

        Returns:
            Mask, bool, of the shape of ``scores``, True for the entries to remove.
        """

    @abstractmethod
    def violation(self, zero: Tensor) -> str:
        """Describe how a matrix with these zeros, (rows, columns) bool, violates the pattern; empty if it does not."""
