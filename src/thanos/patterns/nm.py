"""n:m sparsity: at most n non-zeros in every m consecutive weights of a row.

So n counts the non-zeros, as in the industry: 1:4 keeps a quarter of the weights. Some of the literature counts the zeros
instead. For 2:4 and 4:8 both readings agree.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from thanos.errors import RecipeError
from thanos.patterns.base import Choice, Pattern
from thanos.patterns.budget import Budget, Request
from thanos.patterns.rounding import floor_count

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class NM(Pattern):
    """At most ``n`` non-zeros in every ``m`` consecutive weights of a row; raises RecipeError unless 0 < n < m."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise RecipeError(
                f"pattern {self.n}:{self.m} is impossible: n:m keeps at most n of every m weights, so 0 < n < m"
            )

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Return the pattern for a text ``N:M``, else None."""
        match = re.fullmatch(r"([0-9]{1,6}):([0-9]{1,6})", text)
        return None if match is None else cls(int(match[1]), int(match[2]))

    @property
    def group(self) -> int:
        """Number of consecutive inputs that are decided together: m."""
        return self.m

    @property
    def group_zeros(self) -> int:
        """Number of entries that every group loses: m − n."""
        return self.m - self.n

    @property
    def sparsity(self) -> float:
        """Fraction of weights that the pattern removes: (m − n)/m."""
        return (self.m - self.n) / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def check_width(self, columns: int) -> None:
        """Raise RecipeError for a width that m does not divide: the last group would be partial."""
        if columns % self.m:
            raise RecipeError(
                f"pattern {self} needs a multiple of {self.m} input columns, but the weight has {columns}; skip this "
                "layer (--skip, or an override with skip = true) or choose another pattern for it"
            )

    def check_block_size(self, block_size: int) -> None:
        """Raise RecipeError for a block size that would cut a group of m in two."""
        if block_size % self.m:
            raise RecipeError(
                f"block_size {block_size} would cut a group of pattern {self} in two; use a multiple of {self.m}"
            )

    def check_keep_budget(self, outlier_rows: float) -> None:
        """Raise RecipeError for an odd n, which has no half, and for ``outlier_rows`` above n / (2m − n)."""
        if self.n % 2:
            raise RecipeError(
                f"keep_budget with outlier_rows gives some rows half of the non-zeros, but {self} keeps an odd number of "
                f"{self.n}; choose a pattern with an even one, such as 2:4, or leave keep_budget out"
            )
        # Every outlier row needs 2(m − n)/n halved rows, and both kinds together cannot be more than all rows.
        most = self.n / (2 * self.m - self.n)
        if outlier_rows > most:
            raise RecipeError(
                f"outlier_rows {outlier_rows} is too much for keep_budget with pattern {self}: the other rows can make "
                f"up for at most {most:.4g}; lower outlier_rows or leave keep_budget out"
            )

    def budget(self, request: Request) -> Budget:
        """Return how much is removed; :class:`Budget` explains the halved rows of ``keep_budget``."""
        budget = Pattern.budget(self, request)
        if request.keep_budget and 0 < budget.outlier_rows < request.rows:
            halved = floor_count(2 * budget.outlier_rows * (self.m - self.n) / self.n + 0.5)
            budget = replace(budget, halved_rows=halved)
        return budget

    def halved(self) -> NM:
        """Return the pattern that keeps n/2 of m."""
        return NM(self.n // 2, self.m)

    def mask(self, choice: Choice, scores: Tensor, *, by_row: bool = False) -> Tensor:
        """Choose the entries with the m − n smallest scores of every group."""
        del by_row
        return choice.smallest_of_each_group(scores, self.m - self.n, self.m)

    def violation(self, zero: Tensor) -> str:
        """Describe a violation: a group holds more than n non-zeros, or m does not divide the width."""
        rows, columns = zero.shape
        if columns % self.m:
            return f"{columns} columns are no multiple of {self.m}"
        left = (~zero).view(rows, -1, self.m).sum(2)
        bad = int((left > self.n).sum())
        return f"{bad:,} of {left.numel():,} groups hold more than {self.n} non-zeros" if bad else ""
