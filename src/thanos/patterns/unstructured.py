"""No pattern: any entry may be zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from thanos.patterns.base import Choice, Pattern

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Unstructured(Pattern):
    """Any weight may be removed."""

    any_entries: ClassVar[bool] = True
    can_be_required: ClassVar[bool] = False

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Return the pattern for the text ``unstructured``, else None."""
        return cls() if text == "unstructured" else None

    def __str__(self) -> str:
        return "unstructured"

    def mask(self, choice: Choice, scores: Tensor, *, by_row: bool = False) -> Tensor:
        """Choose the smallest scores of all rows; with ``by_row``, the same number from each row as far as possible."""
        select = choice.smallest_of_each_row if by_row else choice.smallest
        return select(scores, choice.budget.weights)

    def violation(self, zero: Tensor) -> str:
        """Return an empty text: no matrix violates the pattern."""
        del zero
        return ""
