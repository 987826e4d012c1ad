"""The settings of patterns that remove whole units of a model, and the settings that such a pattern excludes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from thanos.errors import RecipeError
from thanos.patterns.base import Pattern
from thanos.patterns.units import HEADS, NEURONS, Units
from thanos.registry import parse_pattern

if TYPE_CHECKING:
    from thanos.recipe import Recipe

HEAD_UNITS = ("group", "query")
"""Heads that grouped-query attention loses together: a key-value head with its query heads, or one query head of each group."""

_MULTIPLES = {NEURONS: 64, HEADS: 1}
"""Kind → default of ``multiple_of``, a divisor of the number of remaining units."""

_FIXED = ("pattern", "sparsity")
"""Settings that are the same for all layers, so that the model has one size in all blocks."""


def default_multiple(pattern: Pattern) -> int | None:
    """Return the default of ``multiple_of`` for a pattern; for a pattern with two kinds, that of its neurons.

    None for a pattern that removes no such units.
    """
    return next((_MULTIPLES[kind] for kind in pattern.unit_kinds if kind in _MULTIPLES), None)


def check_outlier_rows(pattern: Pattern, outlier_rows: float, keep_budget: bool) -> None:
    """Refuse ``outlier_rows`` and ``keep_budget`` for a pattern that removes units.

    Raises:
        RecipeError: one of them is set.
    """
    if pattern.unit_kinds and outlier_rows > 0:
        raise RecipeError(
            f"outlier_rows {outlier_rows:g} is impossible with pattern {pattern}: a dense row would need the removed units; "
            "leave outlier_rows out"
        )
    if pattern.unit_kinds and keep_budget:
        raise RecipeError(
            f"keep_budget has no meaning for pattern {pattern}, which allows no outlier rows to make up for; leave keep_budget "
            "out"
        )


def check_units(recipe: Recipe) -> None:
    """Check a recipe's ``multiple_of`` and ``head_unit``, and what its pattern of units excludes.

    Raises:
        RecipeError: a setting contradicts the pattern.
    """
    pattern = recipe.parsed_pattern
    _check_use("multiple_of", recipe.multiple_of, pattern, {NEURONS, HEADS})
    _check_use("head_unit", recipe.head_unit, pattern, {HEADS})
    for override in recipe.overrides:
        other = override.settings.get("pattern")
        if other is not None and not pattern.unit_kinds and parse_pattern(other).unit_kinds:
            raise RecipeError(
                f"the override of {override.match!r} has pattern {other}, which removes the same number of units "
                "from every block; make it the recipe's own pattern"
            )
    if not pattern.unit_kinds:
        return
    if isinstance(pattern, Units) and pattern.count:
        raise RecipeError(f"pattern {pattern} is for a single matrix; for a model give {pattern.kind}, without numbers")
    if not recipe.resolved_sparsity > 0:
        raise RecipeError(f"sparsity 0 with pattern {pattern} removes nothing; give a fraction above 0")
    for name in ("targets", "skip"):
        if getattr(recipe, name):
            raise RecipeError(
                f"{name} contradicts pattern {pattern}, which chooses its layers itself and removes the same number of units "
                f"from every block; leave {name} out"
            )
    for override in recipe.overrides:
        fixed = [name for name in _FIXED if name in override.settings]
        if override.skip or fixed:
            raise RecipeError(
                f"the override of {override.match!r} sets {'skip' if override.skip else fixed[0]}, but pattern {pattern} "
                "removes the same number of units from every block; leave it out"
            )


def _check_use(name: str, value: Any, pattern: Pattern, kinds: set[str]) -> None:
    if value is not None and not kinds & {*pattern.unit_kinds}:
        raise RecipeError(f"{name} has no meaning for pattern {pattern}, which removes no such units; leave {name} out")
