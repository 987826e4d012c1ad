"""The choice of the dense target: the share α of the dense model's outputs that lowers a block's error on held-out sequences.

Each candidate is tried with stand-ins for the pruned weights (:mod:`thanos.solvers.stand_in`), which are fitted to the other
sequences. The block runs over the held-out ones with the stand-ins in place, and its outputs are compared with those of the
dense block in the dense model. The candidates ascend, and the first that raises the error ends the search: the stand-ins move
on a line, along which the error falls and then rises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from thanos.recipe.repair import DENSE_TARGETS


@dataclass(slots=True)
class Choice:
    """The candidates of one choice, and the one that was chosen.

    Attributes:
        errors: α → the block's error on the held-out sequences with stand-ins; candidates that were not tried are left out.
    """

    errors: dict[float, float] = field(default_factory=dict)

    @property
    def alpha(self) -> float:
        """The candidate with the smallest error; of equal ones the smallest."""
        return min(self.errors, key=lambda alpha: (self.errors[alpha], alpha))


def choose(
    stand_ins: Callable[[float], Mapping[str, Tensor]], error: Callable[[Mapping[str, Tensor]], float]
) -> Choice:
    """Choose α among :data:`~thanos.recipe.repair.DENSE_TARGETS`.

    Args:
        stand_ins: returns the stand-ins for α, by parameter name.
        error: returns the block's error with such parameters in place.
    """
    choice = Choice()
    for alpha in DENSE_TARGETS:
        found = error(stand_ins(alpha))
        rises = bool(choice.errors) and found > min(choice.errors.values())
        choice.errors[alpha] = found
        if rises:
            break
    return choice
