"""The heads pattern: whole attention heads are removed, and the model becomes smaller."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Self

from thanos.errors import RecipeError
from thanos.patterns.units import HEADS, Units


@dataclass(frozen=True, slots=True)
class Heads(Units):
    """Input columns of the attention's output matrix are removed, all columns of a head at once.

    ``heads:N`` is for a matrix whose columns belong to N consecutive heads. ``heads:G*N`` is for G groups of N heads; the same
    heads are removed from every group. A recipe says ``heads``: the run takes the numbers from the model.
    """

    kind: ClassVar[str] = HEADS
    unit_kinds: ClassVar[tuple[str, ...]] = (HEADS,)

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Return the pattern for the text ``heads``, with numbers or without, else None."""
        match = re.fullmatch(r"heads(?::(?:([1-9]\d*)\*)?([1-9]\d*))?", text)
        return None if match is None else cls(count=int(match[2] or 0), groups=int(match[1] or 1))

    def check_width(self, columns: int) -> None:
        """Refuse a pattern without the number of heads, and columns that the heads do not fill evenly."""
        if not self.count:
            raise RecipeError("pattern heads needs the number of heads of a single matrix, such as heads:9")
        Units.check_width(self, columns)

    def __str__(self) -> str:
        groups = f"{self.groups}*" if self.groups > 1 else ""
        return f"heads:{groups}{self.count}" if self.count else "heads"
