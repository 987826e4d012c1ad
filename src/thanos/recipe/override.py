"""Settings of some layers that differ from the recipe's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from thanos import registry
from thanos.errors import RecipeError
from thanos.recipe.layer import LAYER_FIELDS
from thanos.recipe.repair import REPAIR_FIELDS, Repair, unused_values, with_effort
from thanos.registry import parse_pattern
from thanos.system.suggestions import near

if TYPE_CHECKING:
    from thanos.recipe import Recipe

_OTHER_NAMES = {
    "sequence_length": ("seqlen", "seq_len", "max_length"),
    "samples": ("nsamples", "n_samples", "num_samples"),
    "sparsity": ("sparsity_ratio", "ratio"),
    "damping": ("percdamp", "dampening"),
    "targets": ("target",),
    "override": ("overrides",),
}
"""Setting → the names that other tools give to it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Override:
    """Different settings for the layers whose name matches a glob, or ``skip`` to leave these layers dense.

    Args:
        match: a glob over full module names such as ``model.layers.*.mlp.down_proj`` or ``*.down_proj``.
        skip: leave these layers dense.
        settings: fields of :class:`LayerRecipe` → values that replace the recipe's.
    """

    match: str
    skip: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.match, str) or not self.match:
            raise RecipeError(f"an override needs match, a glob over layer names; got {self.match!r}")
        if not isinstance(self.skip, bool):
            raise RecipeError(f"skip in the override of {self.match!r} must be true or false; got {self.skip!r}")
        unknown = sorted(set(self.settings) - set(LAYER_FIELDS))
        if unknown:
            raise RecipeError(
                f"the override of {self.match!r} has unknown settings {', '.join(unknown)}; "
                f"allowed are skip, {', '.join(LAYER_FIELDS)}{hints(unknown, LAYER_FIELDS)}"
            )


def hints(unknown: Iterable[str], known: Iterable[str]) -> str:
    """Return the hints for unknown names of settings: for each the nearest of the known names."""
    known = [*known]
    return "".join(near(name, known, _OTHER_NAMES) for name in unknown)


def suited_to(pattern: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return changes, with resets: another pattern resets sparsity, block size and scope, and an effort resets its parts."""
    changes = with_effort(changes)
    if str(parse_pattern(changes.get("pattern", pattern))) == str(parse_pattern(pattern)):
        return changes
    return {"sparsity": None, "block_size": None, "scope": None, **changes}


def suited_changes(
    recipe: Recipe,
    changes: Mapping[str, Any],
    overriding: Sequence[str],
    repairs_with: Callable[[Mapping[str, Any]], list[Repair]],
) -> dict[str, Any]:
    """Return changes with the defaults that :meth:`Recipe.suited` adds.

    Args:
        recipe: the recipe to change.
        changes: name of a field → new value.
        overriding: the methods that the recipe's overrides set.
        repairs_with: function that returns the recipe's repairs with some fields changed.
    """
    suited = suited_to(recipe.pattern, changes)
    repairs = repairs_with({name: value for name, value in suited.items() if name in REPAIR_FIELDS})
    needed = {
        setting
        for name in (changes.get("method", recipe.method), *overriding)
        for setting in registry.method(name).settings
    }
    needed |= {"damping"} if any(repair.needs_gram for repair in repairs) else set()
    unused = {name: default for name, default in registry.LAYER_SETTINGS.items() if name not in needed}
    repairing = any(name in changes for name in REPAIR_FIELDS)
    return {
        **(unused if repairing or "method" in changes else {}),
        **(unused_values(repairs) if repairing else {}),
        **suited,
    }
