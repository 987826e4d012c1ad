"""Recipes as TOML files."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from thanos.errors import RecipeError


def read_toml(path: Path) -> dict[str, Any]:
    """Return the values of a TOML file. Raises RecipeError if it cannot be read or is not valid TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        inside = f", such as {path / 'recipe.toml'}" if (path / "recipe.toml").is_file() else ""
        raise RecipeError(f"recipe {path} cannot be read: {error.strerror}; give a TOML file{inside}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {path} is not valid TOML: it is not UTF-8 text; give another file") from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(
            f'recipe {path} is not valid TOML: {error}; a setting is a line such as sparsity = 0.5 or device = "cpu"'
        ) from error


def toml_text(values: Mapping[str, Any], overrides: Iterable[Mapping[str, Any]]) -> str:
    """Return values and tables ``[[override]]`` as TOML text; None is left out."""
    lines = [f"{name} = {_toml(value)}" for name, value in values.items() if value is not None]
    for table in overrides:
        lines += ["", "[[override]]"]
        lines += [f"{name} = {_toml(value)}" for name, value in table.items() if value is not None]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    # TOML writes basic strings, booleans, numbers and arrays of strings exactly as JSON does.
    # The one exception is DEL, which JSON does not escape and TOML forbids.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
