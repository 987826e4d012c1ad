"""What the rest of the project may ask a sparsity pattern, and what a pattern may ask about a weight.

A pattern says which sets of entries may be zero. How a method meets it follows from four facts about the pattern:

- ``any_entries``: any set of ``budget.weights`` entries will do, so a method may choose them as it goes;
- ``group_zeros`` > 0: every ``group`` consecutive entries of a row lose that many, each group by itself, so a method may
  decide a group when it reaches it;
- ``whole_columns``: the same columns go from every row, chosen by a score of each column;
- none of these: :meth:`Pattern.mask` decides once, on the scores of the whole weight.
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
"""Fraction of zeros that a dense row, or a column that stays, may hold by chance: 16-bit weights have a few."""


class Choice(Protocol):
    """What a pattern may ask while it chooses; a :class:`~thanos.solvers.problem.Problem` answers.

    A weight's rows may be spread over processes. These functions count over all of them, and every process calls them in the
    same order.
    """

    @property
    def budget(self) -> Budget:
        """How much is removed from all rows together."""
        ...

    def smallest(self, scores: Tensor, count: int | Tensor) -> Tensor:
        """Return a bool mask with ``count`` True, at the smallest of all rows' scores (c, b)."""
        ...

    def smallest_of_each_row(self, scores: Tensor, count: int) -> Tensor:
        """Return a mask with ``count`` True over all rows, the same number in every row up to one."""
        ...

    def smallest_of_each_group(self, scores: Tensor, count: int, group: int) -> Tensor:
        """Return a mask with ``count`` True in every ``group`` consecutive entries of a row."""
        ...

    def smallest_columns(self, scores: Tensor, count: int) -> Tensor:
        """Return a mask (b,) with ``count`` True; ``scores`` (b,) are the same on every process."""
        ...

    def total(self, counts: Tensor) -> Tensor:
        """Replace an integer tensor, in place, by its sum over the processes that hold the rows; return it."""
        ...


class Pattern(ABC):
    """A sparsity pattern; subclasses are frozen dataclasses, so that equal patterns are equal."""

    __slots__ = ()

    default_sparsity: ClassVar[float] = 0.5
    """Fraction of weights removed where neither the pattern nor the recipe says one."""

    any_entries: ClassVar[bool] = False
    whole_columns: ClassVar[bool] = False

    can_be_required: ClassVar[bool] = True
    """Whether a matrix with zeros can break it, so that ``inspect --require`` makes sense."""

    @classmethod
    @abstractmethod
    def parse(cls, text: str) -> Self | None:
        """Return the pattern that a text names; None if it names none of this class.

        Raises:
            RecipeError: the text names one that is impossible.
        """

    @abstractmethod
    def __str__(self) -> str:
        """Return the text that :meth:`parse` reads."""

    @property
    def group(self) -> int:
        """Consecutive inputs that are decided together: blocks of columns never cut such a group."""
        return 1

    @property
    def group_zeros(self) -> int:
        """Entries that every group of a row loses by itself; 0 for patterns that decide otherwise."""
        return 0

    @property
    def sparsity(self) -> float | None:
        """The fraction of weights that the pattern removes; None where the recipe says how many."""
        return None

    def check_width(self, columns: int) -> None:  # noqa: B027, any width will do
        """Refuse a weight's width.

        Raises:
            RecipeError: the pattern does not fit it.
        """

    def check_block_size(self, block_size: int) -> None:  # noqa: B027, any block size will do
        """Refuse a block size.

        Raises:
            RecipeError: it would cut a group in two.
        """

    def check_keep_budget(self, outlier_rows: float) -> None:
        """Refuse ``keep_budget`` with this fraction of outlier rows, above 0.

        Raises:
            RecipeError: the other rows cannot make up for them, as where the pattern fixes what each row loses.
        """
        del outlier_rows
        if self.sparsity is not None:
            raise RecipeError(f"pattern {self} lets no row make up for outlier rows; leave keep_budget out")

    def budget(self, request: Request) -> Budget:
        """Return how much of a weight is removed."""
        p, rows, columns = request.sparsity, request.rows, request.columns
        return Budget(
            outlier_rows=ceil_count(request.outlier_rows * rows),
            weights=floor_count(p * rows * columns),
            columns=ceil_count(p * columns / (1 - request.outlier_rows)),
        )

    def asks_too_much(self, budget: Budget, rows: int, columns: int) -> bool:
        """Tell whether the rows that may be pruned hold too little for a budget."""
        if self.sparsity is None:
            return budget.weights > (rows - budget.outlier_rows) * columns
        return budget.outlier_rows + budget.halved_rows > rows

    def halved(self) -> Pattern:
        """Return the pattern of the rows that keep half of the non-zeros, ``budget.halved_rows`` of them."""
        return self

    @abstractmethod
    def mask(self, choice: Choice, scores: Tensor, *, by_row: bool = False) -> Tensor:
        """Choose what goes.

        Args:
            choice: the budget, and selections over all rows.
            scores: (c, b), at least 0, the smaller the sooner an entry goes; −1 where it is zero already and must stay so.
                With ``whole_columns`` the columns' scores, (b,).
            by_row: the method compares scores within a row only; ignored by patterns for which that makes no difference.

        Returns:
            bool, of the shape of ``scores``, True where an entry goes.
        """

    @abstractmethod
    def violation(self, zero: Tensor) -> str:
        """Say how a matrix with these zeros, (rows, columns) bool, breaks the pattern; empty if it does not."""
