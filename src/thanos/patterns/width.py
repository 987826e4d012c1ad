"""The width pattern: neurons and heads are removed in the proportion with the least predicted error; a smaller model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from thanos.errors import RecipeError
from thanos.patterns.units import HEADS, NEURONS, ModelUnits

if TYPE_CHECKING:
    from torch import Tensor

    from thanos.patterns.base import Choice


@dataclass(frozen=True, slots=True)
class Width(ModelUnits):
    """Neurons and heads are removed; the sparsity is the fraction of the blocks' parameters that is removed.

    A run chooses one split for the whole model, and every layer gets the pattern of its own units.
    """

    unit_kinds: ClassVar[tuple[str, ...]] = (NEURONS, HEADS)

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Return the pattern for the text ``width``, else None."""
        return cls() if text == "width" else None

    def __str__(self) -> str:
        return "width"

    def check_width(self, columns: int) -> None:
        """Refuse a single matrix: it has either neurons or heads."""
        del columns
        raise self._no_matrix()

    def mask(self, choice: Choice, scores: Tensor, *, by_row: bool = False) -> Tensor:
        """Refuse, as :meth:`check_width` does before."""
        del choice, scores, by_row
        raise self._no_matrix()

    @staticmethod
    def _no_matrix() -> RecipeError:
        return RecipeError("pattern width is for a whole model; for a single matrix give neurons, or heads:N")
