"""The choice of the dense target: the fraction α of the dense model's outputs that gives a block the least held-out error.

Each candidate is tried with stand-ins for the pruned weights (:mod:`thanos.solvers.stand_in`), which are fitted to the
sequences that are not held out. The block runs over the held-out ones with the stand-ins in place, and its outputs are compared
with those of the dense block in the dense model. The error of a token is divided by the token's own norm, since the next block
normalises each token. In a plain sum, a few tokens with a hundred times the norm of the others would outweigh all others.

Most of the error exists before the step, and most candidates differ by less than a thousandth of it. Such differences are not
significant: stand-ins are not the pruned weights, and no later layer is pruned yet. So :data:`PREFERRED` is chosen unless
another candidate is better by :data:`MARGIN`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from thanos.recipe.repair import DENSE_TARGETS

PREFERRED = 0.5
"""The candidate that is chosen unless another one is clearly better."""

MARGIN = 0.01
"""Fraction of the error of :data:`PREFERRED` by which another candidate must be better."""


@dataclass(slots=True)
class Choice:
    """The candidates of one choice, and the one that was chosen.

    Attributes:
        errors: α → the error on the held-out sequences with stand-ins.
    """

    errors: dict[float, float] = field(default_factory=dict)

    @property
    def alpha(self) -> float:
        """The candidate that was chosen; of equal ones the smallest. 0, which changes nothing, if no error is finite."""
        finite = {alpha: error for alpha, error in self.errors.items() if math.isfinite(error)}
        if not finite:
            return 0.0
        best = min(finite, key=lambda alpha: (finite[alpha], alpha))
        clear = PREFERRED not in finite or finite[best] < (1 - MARGIN) * finite[PREFERRED]
        return best if clear else PREFERRED


def choose(
    stand_ins: Callable[[float], Mapping[str, Tensor]], error: Callable[[Mapping[str, Tensor]], float]
) -> Choice:
    """Try each α of :data:`~thanos.recipe.repair.DENSE_TARGETS`.

    ``stand_ins`` returns the stand-ins for α, by parameter name; ``error`` the block's error with such parameters in place.
    """
    return Choice({alpha: error(stand_ins(alpha)) for alpha in DENSE_TARGETS})
