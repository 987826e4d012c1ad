"""n:m sparsity: at most n non-zeros in every m consecutive weights of a row."""

from __future__ import annotations

from dataclasses import dataclass

from thanos.errors import RecipeError


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
