"""The blocks pattern: whole decoder blocks are removed, and the model becomes smaller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from thanos.errors import RecipeError
from thanos.patterns.units import BLOCKS, ModelUnits

if TYPE_CHECKING:
    from torch import Tensor

    from thanos.patterns.base import Choice
    from thanos.patterns.budget import Budget, Request


@dataclass(frozen=True, slots=True)
class Blocks(ModelUnits):
    """Decoder blocks are removed. The layers of the block before them lose nothing, but may be fitted to the old outputs."""

    keeps_all: ClassVar[bool] = True
    unit_kinds: ClassVar[tuple[str, ...]] = (BLOCKS,)

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Return the pattern for the text ``blocks``, else None."""
        return cls() if text == "blocks" else None

    def __str__(self) -> str:
        return "blocks"

    def budget(self, request: Request) -> Budget:
        """Refuse to remove anything from a single matrix."""
        if request.sparsity > 0:
            raise RecipeError("pattern blocks is for a whole model; it removes nothing from a single matrix")
        return ModelUnits.budget(self, request)

    def mask(self, choice: Choice, scores: Tensor, *, by_row: bool = False) -> Tensor:
        """Choose no column: the budget of every matrix is 0."""
        del by_row
        return choice.smallest_columns(scores, choice.budget.columns)
