"""Sparsity patterns: which sets of weights may be removed.

Here ``n:m`` means **at most n non-zeros in every m consecutive weights of a row**, the industry's reading; 1:4 keeps a
quarter of the weights. Some of the literature counts the zeros instead; for 2:4 and 4:8 both agree.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from thanos.errors import RecipeError
from thanos.hints import near_pattern


@dataclass(frozen=True, slots=True)
class Unstructured:
    """Any weight may be removed."""

    group: int = 1
    sparsity: None = None

    def __str__(self) -> str:
        return "unstructured"

    def check_width(self, columns: int) -> None:
        """Any width will do."""

    def check_block_size(self, block_size: int) -> None:
        """Any block size will do."""


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


@dataclass(frozen=True, slots=True)
class NM:
    """At most ``n`` non-zeros in every ``m`` consecutive weights of a row, 0 < n < m.

    Raises:
        RecipeError: n is not below m, or not positive.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise RecipeError(
                f"pattern {self.n}:{self.m} is impossible: n:m keeps at most n of every m weights, so 0 < n < m"
            )

    @property
    def group(self) -> int:
        """Consecutive inputs that are decided together."""
        return self.m

    @property
    def sparsity(self) -> float:
        """The share of weights that the pattern removes."""
        return (self.m - self.n) / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def check_width(self, columns: int) -> None:
        """Refuse a width that m does not divide.

        Raises:
            RecipeError: the last group would be partial.
        """
        if columns % self.m:
            raise RecipeError(
                f"pattern {self} needs a multiple of {self.m} input columns, but the weight has {columns}; skip this "
                "layer (--skip, or an override with skip = true) or choose another pattern for it"
            )

    def check_block_size(self, block_size: int) -> None:
        """Refuse a block size that would cut a group of m in two.

        Raises:
            RecipeError: m does not divide the block size.
        """
        if block_size % self.m:
            raise RecipeError(
                f"block_size {block_size} would cut a group of pattern {self} in two; use a multiple of {self.m}"
            )


Pattern = Unstructured | Columns | NM


def parse_pattern(text: str | Pattern) -> Pattern:
    """Read ``unstructured``, ``columns`` or ``N:M``.

    Raises:
        RecipeError: the text is none of them.
    """
    if isinstance(text, Unstructured | Columns | NM):
        return text
    if text == "unstructured":
        return Unstructured()
    if text == "columns":
        return Columns()
    match = re.fullmatch(r"([0-9]{1,6}):([0-9]{1,6})", text) if isinstance(text, str) else None
    if match is None:
        raise RecipeError(
            f"pattern {text!r} is unknown; choose unstructured, columns, or N:M such as 2:4 (at most N of M weights stay)"
            f"{near_pattern(text)}"
        )
    return NM(int(match[1]), int(match[2]))
