"""How the zeros of a run are divided among its layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from thanos import registry
from thanos.errors import RecipeError
from thanos.recipe.globs import matches

if TYPE_CHECKING:
    from thanos.recipe import Recipe

ALLOCATIONS = ("uniform", "error")
"""Every layer has the recipe's sparsity, or the sparsities minimise the sum of the layer errors at the same total."""


def check_allocation(recipe: Recipe) -> None:
    """Raise RecipeError for an allocation other than ``uniform`` if the pattern fixes the sparsity of each layer."""
    if recipe.allocation != ALLOCATIONS[0] and not recipe.parsed_pattern.any_entries:
        raise RecipeError(
            f"allocation {recipe.allocation} does not fit pattern {recipe.pattern}, which has the same sparsity in "
            f"every layer; leave allocation out, or choose pattern {registry.DEFAULT_PATTERN}"
        )


def is_allocated(recipe: Recipe, name: str) -> bool:
    """Return whether the allocation chooses the sparsity of the layer ``name``.

    A layer whose override sets a sparsity, or a pattern that fixes it, keeps that sparsity. The other layers keep their total
    number of zeros, and the allocation divides it among them.
    """
    settings = None if recipe.allocation == ALLOCATIONS[0] else recipe.for_layer(name)
    if settings is None or not settings.parsed_pattern.any_entries or settings.resolved_sparsity <= 0:
        return False
    return not any(
        override.settings.get("sparsity") is not None for override in recipe.overrides if matches(name, override.match)
    )
