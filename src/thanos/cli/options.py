"""What the commands' options have in common."""

from __future__ import annotations

from typing import Any

import typer


def option(text: str, metavar: str, *names: str) -> Any:
    """Return an option with a help text that states its default. Name it where the metavar is the name in capitals.

    Older releases of the argument parser take such a metavar for the option's name.
    """
    return typer.Option(*names, help=text, metavar=metavar, show_default=False)
