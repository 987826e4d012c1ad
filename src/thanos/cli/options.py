"""What the commands' options have in common."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from thanos import registry
from thanos.errors import UserError

METHOD_HELP = (
    "; ".join(f"{row.name}: {row.help}" for row in registry.methods()) + f" (default {registry.DEFAULT_METHOD})."
)
PATTERN_HELP = (
    "; ".join(f"{row.name}: {row.help}" for row in registry.patterns()) + f" (default {registry.DEFAULT_PATTERN})."
)

NUMBERS = {"SHARE": float, "N": int, "TOKENS": int, "COLUMNS": int}
"""Metavar → what the value of such an option is."""


def option(text: str, metavar: str, *names: str) -> Any:
    """Return an option with a help text that states its default. Name it where the metavar is the name in capitals.

    Older releases of the argument parser take such a metavar for the option's name.
    """
    return typer.Option(*names, help=text, metavar=metavar, show_default=False)


Threads = Annotated[
    int | None,
    option("CPU threads that torch may use; on a shared machine, your share (default: torch's own choice).", "N"),
]

_MOST_THREADS = 1024


def use_threads(threads: int | None) -> None:
    """Let torch use so many threads for one operation, in this process; None leaves its own choice.

    Raises:
        UserError: the number is none that torch can use.
    """
    check_threads(threads)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def check_threads(threads: int | None) -> None:
    """Refuse a number of threads that torch cannot use.

    Raises:
        UserError: it is below 1 or above 1024.
    """
    if threads is not None and not 1 <= threads <= _MOST_THREADS:
        raise UserError(
            f"--threads must be a whole number, 1 to {_MOST_THREADS}; got {threads}; best is at most the number of cores"
        )


def using(setting: str) -> str:
    """Return which methods use a setting, as a part of a help text."""
    return f", for {', '.join(row.name for row in registry.methods() if setting in row.settings)}"
