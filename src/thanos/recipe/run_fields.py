"""The checks of a recipe's fields that belong to a whole run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from thanos.errors import RecipeError
from thanos.recipe.checks import check_settings
from thanos.recipe.repair import PROMPT, WITHOUT_GENERATED
from thanos.system.suggestions import near_dtype

if TYPE_CHECKING:
    from thanos.recipe import Recipe

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Data types in which a model can run and be written."""

_MOST_TOKENS = 2**60
"""Number of token ids, of 8 bytes each, that no machine holds. Larger numbers overflow in torch."""

_DESCRIBED = (
    *("samples", "sequence_length", "generate", "segment", "prompt", "seed", "allocation", "multiple_of", "head_unit"),
    *("held_out", "tune_rate", "tune_loss", "trust_remote_code"),
)
"""Fields whose descriptions state every allowed value."""


def check_run_fields(recipe: Recipe) -> None:
    """Raise RecipeError, which names the setting, for wrong values of calibration, device, dtype, globs and flags."""
    check_settings(type(recipe), {name: getattr(recipe, name) for name in _DESCRIBED})
    for name in ("dtype", "output_dtype"):
        if (value := getattr(recipe, name)) not in DTYPES:
            raise RecipeError(
                f"{name} {value!r} is unknown; choose one of {', '.join(DTYPES)}{near_dtype(value, DTYPES)}"
            )
    for name in ("calibration", "device"):
        if not isinstance(getattr(recipe, name), str) or not getattr(recipe, name):
            several = isinstance(getattr(recipe, name), list | tuple) and name == "calibration"
            hint = "; separate several texts by commas in one string" if several else ""
            raise RecipeError(f"{name} must be a name; got {getattr(recipe, name)!r}{hint}")
    check_prompts_setting(recipe.prompts, recipe.prompt)
    if recipe.generate and recipe.calibration == "self":
        raise RecipeError(
            f"calibration 'self' has no text of which the model could continue pieces (generate is {recipe.generate}); raise "
            "samples instead"
        )
    for name, default in WITHOUT_GENERATED.items():
        if (value := getattr(recipe, name)) != default and not recipe.generate:
            raise RecipeError(
                f"{name} {value} has no meaning without generated sequences; leave {name} out, or set generate above 0"
            )
    if (recipe.samples + recipe.generate) * recipe.sequence_length > _MOST_TOKENS:
        generated = f" + {recipe.generate} (generate)" if recipe.generate else ""
        raise RecipeError(
            f"{recipe.samples} (samples){generated} calibration sequences of {recipe.sequence_length} tokens "
            "(sequence_length) are more than any machine can hold; give fewer or shorter sequences"
        )
    for name in ("targets", "skip"):
        value = getattr(recipe, name)
        if not isinstance(value, list | tuple) or not all(isinstance(glob, str) and glob for glob in value):
            raise RecipeError(f"{name} must be a list of globs over layer names; got {value!r}")
    if recipe.measure_error is not None and not isinstance(recipe.measure_error, bool):
        raise RecipeError(f"measure_error must be true, false or left out; got {recipe.measure_error!r}")


def check_prompts_setting(prompts: object, prompt: int) -> None:
    """Raise RecipeError if ``prompts`` is no name of files, or if ``prompt``, which they replace, is given too."""
    if prompts is None:
        return
    if not isinstance(prompts, str) or not prompts:
        raise RecipeError(f"prompts must be the name of a text file, or left out; got {prompts!r}")
    if prompt != PROMPT:
        raise RecipeError(
            f"prompt {prompt} has no meaning with prompts ({prompts}), which are used whole; leave one of them out"
        )
