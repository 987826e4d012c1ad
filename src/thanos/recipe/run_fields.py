"""The checks of a recipe's fields that belong to a whole run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from thanos.errors import RecipeError
from thanos.system.suggestions import near_dtype, near_whole

if TYPE_CHECKING:
    from thanos.recipe import Recipe

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Data types in which a model can run and be written."""


def check_run_fields(recipe: Recipe) -> None:
    """Raise RecipeError, which names the setting, for wrong values of calibration, device, dtype, globs and flags."""
    for name, lowest in (("samples", 1), ("sequence_length", 2), ("seed", 0)):
        value = getattr(recipe, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
            raise RecipeError(f"{name} must be a whole number, at least {lowest}; got {value!r}{near_whole(value)}")
    for name in ("dtype", "output_dtype"):
        if (value := getattr(recipe, name)) not in DTYPES:
            raise RecipeError(
                f"{name} {value!r} is unknown; choose one of {', '.join(DTYPES)}{near_dtype(value, DTYPES)}"
            )
    for name in ("calibration", "device"):
        if not isinstance(getattr(recipe, name), str) or not getattr(recipe, name):
            raise RecipeError(f"{name} must be a name; got {getattr(recipe, name)!r}")
    for name in ("targets", "skip"):
        value = getattr(recipe, name)
        if not isinstance(value, list | tuple) or not all(isinstance(glob, str) and glob for glob in value):
            raise RecipeError(f"{name} must be a list of globs over layer names; got {value!r}")
    if not isinstance(recipe.trust_remote_code, bool):
        raise RecipeError(f"trust_remote_code must be true or false; got {recipe.trust_remote_code!r}")
    if recipe.measure_error is not None and not isinstance(recipe.measure_error, bool):
        raise RecipeError(f"measure_error must be true, false or left out; got {recipe.measure_error!r}")
