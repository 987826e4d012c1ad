"""The choice of the dense target: the share α of the dense model's outputs that lowers a block's error on held-out sequences.

Each candidate is tried with stand-ins for the pruned weights: a mask by |W|·‖X‖ and a short refit, whatever the method is. They
are fitted to the other sequences. The block then runs over the held-out ones with the stand-ins in place, and its outputs are
compared with those of the dense block in the dense model. The candidates ascend, and the first that raises the error ends the
search: along α the weights move on a line, so the error falls and then rises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from thanos import registry
from thanos.recipe import LayerRecipe
from thanos.recipe.repair import DENSE_TARGETS

REFIT_STEPS = 8
"""Steps of the stand-ins' refit: enough for most of its gain, for a third of the cost of the repair's own."""


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
    for alpha, found in _errors(stand_ins, error):
        rises = bool(choice.errors) and found > min(choice.errors.values())
        choice.errors[alpha] = found
        if rises:
            break
    return choice


def _errors(
    stand_ins: Callable[[float], Mapping[str, Tensor]], error: Callable[[Mapping[str, Tensor]], float]
) -> Iterator[tuple[float, float]]:
    for alpha in DENSE_TARGETS:
        yield alpha, error(stand_ins(alpha))


def stand_in_recipe(settings: LayerRecipe) -> LayerRecipe:
    """Return the settings of a layer's stand-in: the same pattern and sparsity, by the cheapest method that sees the inputs."""
    return settings.by(registry.stand_in_method(settings.parsed_pattern).name).with_refit(REFIT_STEPS)
