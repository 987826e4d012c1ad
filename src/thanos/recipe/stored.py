"""Values of a recipe as files hold them: names with hyphens, and settings that earlier versions accepted."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from thanos import registry
from thanos.errors import RecipeError
from thanos.recipe.layer import repairs_of
from thanos.recipe.override import Override, hints
from thanos.recipe.repair import REPAIR_FIELDS, unused_values

ADDED = (
    *("scope", "allocation", "multiple_of", "head_unit", *REPAIR_FIELDS, "held_out", "tune_rate", "tune_loss"),
    *("output_dtype", "generate", "segment", "prompt", "prompts"),
)
"""Settings that came after the first version. They are written only where they differ from their defaults."""


def underscored(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table's values under names with underscores. Raises RecipeError if a name is given twice."""
    named: dict[str, Any] = {}
    for name, value in values.items():
        name = name.replace("-", "_")
        if name in named:
            raise RecipeError(f"{name} is given twice, once with a hyphen and once with an underscore; leave one out")
        named[name] = value
    return named


def without_unused(values: dict[str, Any], overrides: list[Override]) -> tuple[dict[str, Any], list[Override]]:
    """Drop settings that nothing in the recipe or the override uses.

    These are settings of :data:`~thanos.registry.LAYER_SETTINGS`, and those of :func:`~thanos.recipe.repair.unused_values`.
    """
    base = values.get("method", registry.DEFAULT_METHOD)
    rows = [registry.method(name) for name in (base, *(o.settings.get("method", base) for o in overrides))]
    used = {setting for row in rows for setting in row.settings}
    repairs = repairs_of(values, [override.settings for override in overrides if not override.skip])
    damping = {"damping"} if any(repair.needs_gram for repair in repairs) else set[str]()  # whatever the method
    values = {name: value for name, value in values.items() if name not in unused_values(repairs)}

    def kept(settings: Mapping[str, Any], allowed: Iterable[str]) -> dict[str, Any]:
        return {
            name: value for name, value in settings.items() if name in allowed or name not in registry.LAYER_SETTINGS
        }

    def allowed_in(override: Override) -> Iterable[str]:
        own = registry.method(override.settings["method"]).settings if "method" in override.settings else used
        return {*own, *damping}

    return kept(values, used | damping), [
        dataclasses.replace(o, settings=kept(o.settings, allowed_in(o))) for o in overrides
    ]


def fields_of(values: Mapping[str, Any], known: set[str], *, stored: bool) -> dict[str, Any]:
    """Return the fields of a recipe from plain values; the overrides are built.

    Args:
        values: name → value, the names with hyphens or underscores.
        known: the allowed names.
        stored: whether to drop settings that nothing in the recipe uses.

    Raises:
        RecipeError: a name is unknown, or a value cannot be an override or a list of globs.
    """
    values = underscored(values)
    unknown = sorted(set(values) - known)
    if unknown:
        raise RecipeError(
            f"unknown settings: {', '.join(unknown)}; allowed are {', '.join(sorted(known))}{hints(unknown, known)}"
        )
    overrides = values.pop("override", [])
    if not isinstance(overrides, list | tuple) or not all(isinstance(o, Mapping) for o in overrides):
        raise RecipeError("override must be a list of tables ([[override]])")
    built = []
    for table in overrides:
        settings = underscored(table)
        match, skip = settings.pop("match", ""), settings.pop("skip", False)
        built.append(Override(match=match, skip=skip, settings=settings))
    for name in ("targets", "skip"):
        if not isinstance(values.get(name, []), list | tuple):
            raise RecipeError(f"{name} must be a list of globs, for example [{json.dumps(str(values[name]))}]")
    if stored:
        values, built = without_unused(values, built)
    return values | {"overrides": tuple(built)}
