"""Values of a recipe as files hold them: names with hyphens, and settings that earlier versions accepted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from thanos import registry
from thanos.errors import RecipeError
from thanos.recipe.override import Override


def underscored(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table's values under names with underscores.

    Raises:
        RecipeError: a name is given twice.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        name = name.replace("-", "_")
        if name in found:
            raise RecipeError(f"{name} is given twice, once with a hyphen and once with an underscore; leave one out")
        found[name] = value
    return found


def without_unused(values: dict[str, Any], overrides: list[Override]) -> tuple[dict[str, Any], list[Override]]:
    """Drop the settings of :data:`~thanos.registry.LAYER_SETTINGS` that no method of the recipe or the override uses."""
    base = values.get("method", registry.DEFAULT_METHOD)
    rows = [registry.method(name) for name in (base, *(o.settings.get("method", base) for o in overrides))]
    used = {setting for row in rows for setting in row.settings}

    def kept(settings: Mapping[str, Any], allowed: Iterable[str]) -> dict[str, Any]:
        return {
            name: value for name, value in settings.items() if name in allowed or name not in registry.LAYER_SETTINGS
        }

    def of(override: Override) -> Iterable[str]:
        return registry.method(override.settings["method"]).settings if "method" in override.settings else used

    return kept(values, used), [dataclasses.replace(o, settings=kept(o.settings, of(o))) for o in overrides]
