"""Tables of rows by name, the import of their code, and the user's modules that add rows (plug-ins)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Generic, TypeVar

from thanos.errors import RecipeError
from thanos.system.suggestions import near

PLUGINS_VARIABLE = "THANOS_PLUGINS"


@dataclass(frozen=True, kw_only=True, slots=True)
class Named:
    """The attributes of every kind of row.

    Attributes:
        name: name in a recipe.
        title: name in reports and messages.
        help: description in one line, without a full stop.
    """

    name: str
    title: str
    help: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Row(Named):
    """A row with code.

    Attributes:
        source: the code as ``module:name``, imported when it is used; or the object itself.
    """

    source: str | Callable[..., Any]

    def load(self) -> Any:
        """Return the object that ``source`` names."""
        return imported(self.source)


R = TypeVar("R", bound=Named)


class Table(Generic[R]):
    """Rows of one kind by name, in order: the rows of this package, then those that other files registered."""

    def __init__(self, kind: str, rows: tuple[R, ...]) -> None:
        self._kind, self._rows = kind, {row.name: row for row in rows}

    def register(self, row: R) -> R:
        """Add a row. Raises RecipeError if another row has the same name."""
        if self._rows.get(row.name, row) != row:
            raise RecipeError(f"{self._kind} {row.name} is registered already; choose another name")
        self._rows[row.name] = row
        return row

    def rows(self) -> tuple[R, ...]:
        """Return all rows, including those of the plug-ins."""
        load_plugins()
        return tuple(self._rows.values())

    def get(self, name: Any) -> R:
        """Return the row with a name. Raises RecipeError if no row has it."""
        row = self.find(name)
        if row is None:
            allowed = ", ".join(row.name for row in self.rows())
            raise RecipeError(f"{self._kind} {name!r} is unknown; choose one of {allowed}{near(name, self._rows)}")
        return row

    def find(self, name: Any) -> R | None:
        """Return the row with a name; None if no row has it."""
        load_plugins()
        return self._rows.get(name) if isinstance(name, str) else None


@cache
def imported(source: str | Callable[..., Any]) -> Any:
    """Return the object that ``module:name`` names. Another object is returned unchanged."""
    if not isinstance(source, str):
        return source
    module, _, name = source.partition(":")
    return getattr(import_module(module), name)


_loaded: set[str] = set()


def load_plugins() -> None:
    """Import the modules that ``THANOS_PLUGINS`` names, each once. Raises RecipeError if one cannot be imported."""
    for name in os.environ.get(PLUGINS_VARIABLE, "").split(","):
        if not (name := name.strip()) or name in _loaded:
            continue
        _loaded.add(name)  # before the import: the module reads the table, which calls this again
        try:
            import_module(name)
        except Exception as error:
            _loaded.discard(name)
            raise RecipeError(
                f"{PLUGINS_VARIABLE} names {name}, which cannot be imported ({type(error).__name__}: {error}); put its folder "
                "on PYTHONPATH, or correct the variable"
            ) from error
