"""What the commands' options have in common."""

from __future__ import annotations

from typing import Any

import typer

from thanos import registry

METHOD_HELP = (
    "; ".join(f"{row.name}: {row.help}" for row in registry.methods()) + f" (default {registry.DEFAULT_METHOD})."
)
PATTERN_HELP = (
    "; ".join(f"{row.name}: {row.help}" for row in registry.patterns()) + f" (default {registry.DEFAULT_PATTERN})."
)


def option(text: str, metavar: str, *names: str) -> Any:
    """Return an option with a help text that states its default. Name it where the metavar is the name in capitals.

    Older releases of the argument parser take such a metavar for the option's name.
    """
    return typer.Option(*names, help=text, metavar=metavar, show_default=False)


def using(setting: str) -> str:
    """Return which methods use a setting, as a part of a help text."""
    return f", for {', '.join(row.name for row in registry.methods() if setting in row.settings)}"
