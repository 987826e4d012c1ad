"""Globs over the names of layers."""

from __future__ import annotations

import fnmatch
from typing import TYPE_CHECKING

from thanos.errors import RecipeError

if TYPE_CHECKING:
    from thanos.recipe import Recipe


def matches(name: str, glob: str) -> bool:
    """Return whether a glob matches a full module name, or its end after a dot: ``q_proj`` matches every q_proj."""
    return fnmatch.fnmatchcase(name, glob) or fnmatch.fnmatchcase(name, f"*.{glob}")


def check_globs(recipe: Recipe) -> None:
    """Raise RecipeError for globs with characters that no layer's name has, before a model is opened."""
    overrides = [("match", override.match) for override in recipe.overrides]
    for name, glob in [*(("targets", g) for g in recipe.targets), *(("skip", g) for g in recipe.skip), *overrides]:
        allowed = "a glob over layer names has letters, digits, _, -, dots, and *, ?, [abc] or [!abc]"
        if "," in glob or glob != "".join(glob.split()):
            raise RecipeError(f"{name} {glob!r} looks like several globs; give each separately: {allowed}")
        strange = [letter for letter in dict.fromkeys(glob) if letter in "^$|()\\{}+/:;'\"="]
        if strange:
            raise RecipeError(f"{name} {glob!r} has {' '.join(strange)}; {allowed}, such as *.mlp.* or q_proj")
        if glob.count("[") != glob.count("]"):
            raise RecipeError(f"{name} {glob!r} has an unmatched bracket; {allowed}")
