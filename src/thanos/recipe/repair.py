"""The repair of a pruned layer: which parts of it are on, and the checks of their settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from thanos import registry
from thanos.errors import RecipeError
from thanos.registry import EffortRow
from thanos.system.suggestions import near, near_number

if TYPE_CHECKING:
    from thanos.recipe import Recipe

AUTO: Literal["auto"] = "auto"
"""The value of ``dense_target`` for a choice on held-out sequences."""

DENSE_TARGETS = (0.0, 0.25, 0.5, 1.0)
"""The values of α among which ``auto`` chooses."""

REPAIR_FIELDS = ("effort", "dense_target", "sequential", "refit", "tune")
"""The fields of :class:`~thanos.recipe.layer.LayerRecipe` from which a :class:`Repair` is made."""

EFFORT_PARTS = ("scope", *REPAIR_FIELDS[1:])
"""The settings that an effort sets where they are not given."""

HELD_OUT_FRACTION = 1 / 16
"""Fraction of the calibration sequences that are held out unless the recipe says otherwise: 8 of 128."""

SEGMENT = 256
"""Default number of tokens of a piece that the dense model generates, and of those into which the recovery cuts its text."""

PROMPT = 32
"""Default number of tokens of the calibration text with which such a generated piece begins."""

WITHOUT_GENERATED: dict[str, Any] = {"generate": 0, "segment": SEGMENT, "prompt": PROMPT, "prompts": None}
"""The settings of a recipe that describe generated sequences, with their values where there are none."""

TUNE_RATE = 8e-3
"""Peak learning rate of the tuning, as a fraction of the root mean square of the block's remaining weights. That mean is 0.27
for SmolLM2-135M at 50 %, where the absolute rate 2e-3 was the best of three (perplexity 31.4 with 3e-4, 30.1 with 1e-3, 29.7
with 2e-3). The weights of other models are ten times as small, and the same absolute rate destroys them."""

TUNE_LOSSES = ("block", "token")
"""The error that the tuning minimises: the squared error of all tokens together, relative to their squares, or the mean of the
tokens' own relative squared errors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Repair:
    """The parts of a layer's repair, each with its value: the setting, or the value of the effort.

    Attributes:
        dense_target: fraction α of the dense model's outputs in the target that the layer is fitted to, in [0, 1], or ``auto``:
            chosen on held-out sequences. 0 is off.
        sequential: whether the statistics of the layer's inputs are gathered after the earlier layers of its block are pruned.
        refit: conjugate-gradient steps on the remaining weights; 0 is off.
        tune: epochs of training of the layer's block; 0 is off.
    """

    dense_target: float | Literal["auto"]
    sequential: bool
    refit: int
    tune: int

    @property
    def retargets(self) -> bool:
        """Whether the layer may be fitted to outputs other than those of its own weights on its own inputs."""
        return self.dense_target != 0

    @property
    def needs_dense_stream(self) -> bool:
        """Whether a part needs the hidden states of the dense model."""
        return self.retargets or self.tune > 0

    @property
    def holds_out(self) -> bool:
        """Whether a part needs sequences that are held out."""
        return self.dense_target == AUTO or self.tune > 0

    @property
    def needs_gram(self) -> bool:
        """Whether a part needs XᵀX of the layer's inputs, whatever its method needs."""
        return self.retargets or self.refit > 0


def resolved(settings: Mapping[str, Any]) -> Repair:
    """Return the parts of a repair from checked :data:`REPAIR_FIELDS`: a setting that is None has the value of its effort."""
    row: EffortRow = registry.effort(settings["effort"])
    parts = {name: getattr(row, name) for name in Repair.__dataclass_fields__}
    return Repair(**parts | {name: settings[name] for name in parts if settings[name] is not None})


def with_effort(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return changes of settings. A new effort replaces all of its parts: those that the changes do not set become None."""
    return {**(dict.fromkeys(EFFORT_PARTS) if "effort" in changes else {}), **changes}


def unused_values(repairs: Iterable[Repair]) -> dict[str, Any]:
    """Return the defaults, by name, of the settings of a run that none of its repairs uses.

    The settings are ``held_out``, for a chosen dense target and for tuning, and ``tune_rate`` and ``tune_loss``, for tuning.
    """
    repairs = list(repairs)
    held_out = {} if any(repair.holds_out for repair in repairs) else {"held_out": None}
    tuning = {"tune_rate": TUNE_RATE, "tune_loss": TUNE_LOSSES[0]}
    return held_out | ({} if any(repair.tune for repair in repairs) else tuning)


def check_run_repair(recipe: Recipe) -> None:
    """Refuse settings of a run's repair that differ from their default and that no layer uses.

    Raises:
        RecipeError: there is such a setting, or too few sequences to hold any out.
    """
    users = {"held_out": f"dense_target {AUTO} or tune"}
    for name, default in unused_values(recipe.repairs).items():
        if (value := getattr(recipe, name)) != default:
            raise RecipeError(f"no layer uses {name} (got {value!r}); leave it out, or set {users.get(name, 'tune')}")
    if recipe.holds_out:
        held_out_of(recipe.samples, recipe.held_out)


def checked_target(value: Any) -> float | str:
    """Return a dense target; a number in a text becomes a number. Raises RecipeError for another value."""
    if value == AUTO:
        return AUTO
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if isinstance(number, int | float) and not isinstance(number, bool) and 0 <= number <= 1:
        return float(number)
    hint = (
        near(value, [AUTO])
        if number is None
        else near_number(value, fraction=True, allows=lambda number: 0 <= number <= 1)
    )
    raise RecipeError(f"dense_target must be {AUTO} or a number, at least 0 and at most 1; got {value!r}{hint}")


def held_out_count(recipe: Recipe, sequences: int) -> int:
    """Return how many of a run's sequences, the generated ones included, are held out; 0 if no part of the repair needs any."""
    return held_out_of(sequences - recipe.generate, recipe.held_out) if recipe.holds_out else 0


def held_out_of(samples: int, held_out: int | None) -> int:
    """Return how many of ``samples`` sequences of the calibration text are held out: the last ones.

    ``held_out`` is the recipe's setting; None means :data:`HELD_OUT_FRACTION` of the sequences, at least one. Raises
    RecipeError if no sequence would be left to prune with.
    """
    count = max(1, round(samples * HELD_OUT_FRACTION)) if held_out is None else held_out
    if count >= samples:
        raise RecipeError(
            f"of {samples} calibration sequence{'s' * (samples != 1)}, {count} would be held out to choose the dense target "
            "and to guard the tuning, and none would be left; raise samples, lower held_out, or set dense_target to a number "
            "and tune to 0"
        )
    return count
