"""The neurons pattern: whole intermediate neurons of the MLPs are removed, and the model becomes smaller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from thanos.patterns.units import NEURONS, Units


@dataclass(frozen=True, slots=True)
class Neurons(Units):
    """Input columns of an MLP's second matrix are removed, one for each neuron, and the neuron's weights in the first one."""

    kind: ClassVar[str] = NEURONS
    unit_kinds: ClassVar[tuple[str, ...]] = (NEURONS,)

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Return the pattern for the text ``neurons``, else None."""
        return cls() if text == "neurons" else None

    def of_writer(self, count: int, groups: int) -> Self:
        """Return the pattern itself: every column is a unit."""
        assert groups == 1
        del count
        return self

    def __str__(self) -> str:
        return "neurons"
