"""How the zeros of a run are divided among its layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from thanos import registry
from thanos.errors import RecipeError
from thanos.recipe.globs import matches

if TYPE_CHECKING:
    from thanos.recipe import Recipe

ALLOCATIONS = ("uniform", "error")
"""Every layer has the recipe's sparsity; or the layers' sparsities minimise the sum of their errors at the same total."""


def check_allocation(recipe: Recipe) -> None:
    """Raise RecipeError for an allocation other than ``uniform`` if the pattern fixes the sparsity of each layer."""
    if recipe.allocation != ALLOCATIONS[0] and not recipe.parsed_pattern.any_entries:
        raise RecipeError(
            f"allocation {recipe.allocation} has nothing to choose with pattern {recipe.pattern}, which must have the same "
            f"sparsity in every layer; leave allocation out, or choose pattern {registry.DEFAULT_PATTERN}"
        )


def is_allocated(recipe: Recipe, name: str) -> bool:
    """Return whether the allocation chooses the sparsity of the layer ``name``.

    It does not for a layer whose override sets a sparsity, or a pattern that fixes it: these keep theirs, and the others share
    the zeros that they would have had without an allocation.
    """
    settings = None if recipe.allocation == ALLOCATIONS[0] else recipe.for_layer(name)
    if settings is None or not settings.parsed_pattern.any_entries or settings.resolved_sparsity <= 0:
        return False
    return not any(
        override.settings.get("sparsity") is not None for override in recipe.overrides if matches(name, override.match)
    )
