"""The commands' options: those of a recipe, made from its fields, and others that several commands have."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from thanos import registry
from thanos.errors import UserError
from thanos.recipe import Recipe
from thanos.settings import Heading, Setting, either, settings_of, value_types

NUMBERS = {"FRACTION": float, "N": int, "TOKENS": int, "COLUMNS": int}
"""Metavar → what the value of such an option is."""

SETTINGS, _TYPES = settings_of(Recipe), value_types(Recipe)

C = TypeVar("C", bound=Callable[..., None])


def option(text: str, heading: Heading, metavar: str | None, *names: str, default: str | None = None) -> Any:
    """Return an option; :class:`~thanos.cli.arguments.Command` adds the default to its help text.

    Args:
        text: what it is, without a full stop.
        heading: under which it is shown.
        metavar: the unit of its value, or else what it is; None for a flag.
        names: name it where the metavar is the name in capitals, which older releases of the argument parser take for its name.
        default: in words; None to show the parameter's.
    """
    return typer.Option(*names, help=text, metavar=metavar, show_default=default or True, rich_help_panel=heading)


def with_settings(
    *names: str, repeated: Collection[str] = (), changed: Mapping[str, Mapping[str, Any]] | None = None
) -> Callable[[C], C]:
    """Give a command, in place of its ``**settings``, one option for each of these fields of a recipe.

    A setting that is not given is None, False for a flag; see :func:`given`.

    Args:
        names: of fields of :class:`~thanos.recipe.Recipe`.
        repeated: those that may be given several times though a recipe has one value.
        changed: name → what this command says otherwise, as for :class:`~thanos.settings.Setting`.
    """

    def decorate(command: C) -> C:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        made = [_parameter(name, replace(SETTINGS[name], **(changed or {}).get(name, {})), repeated) for name in names]
        ordered = sorted([*made, *own], key=lambda p: p.kind)  # arguments first, as a signature demands
        command.__signature__ = signature.replace(parameters=ordered)  # type: ignore[attr-defined]
        return command

    return decorate


def _parameter(name: str, described: Setting, repeated: Collection[str]) -> inspect.Parameter:
    kind, several = _TYPES[name]
    several = several or name in repeated
    text = described.help
    if described.choices is not None:
        text += f": {either(described.choices())}"
    if described.bounds:
        text += f", {described.bounds}"
    if several:
        text += "; may be repeated"
    flag = kind is bool
    annotation = Annotated[
        bool if flag else (list[kind] if several else kind) | None,
        option(
            text, described.heading, described.metavar or None, f"--{name.replace('_', '-')}", default=described.default
        ),
    ]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=False if flag else None, annotation=annotation
    )


def given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those settings that the command line gave, as a recipe takes them."""
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in settings.items()
        if value is not None and value is not False and value not in ([], ())
    }


def examples(*lines: tuple[str, str]) -> str:
    """Return the end of a command's help: what each example does, and the command."""
    return "\n".join(f"  {what}:\n    {command}" for what, command in lines)


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A hub name, a local Hugging Face folder, or a .gguf file.", show_default=False
    ),
]
Quiet = Annotated[bool, option("Show no progress", Heading.OUTPUT, None, "--quiet", "-q")]
JsonFile = Annotated[
    Path | None, option("Write the result as JSON, - for the standard output", Heading.OUTPUT, "FILE", "--json")
]
Activations = Annotated[
    str,
    option(
        "Storage tier of the hidden states between blocks: device, host, disk, or auto, the first that has room",
        Heading.RUN,
        "TIER",
    ),
]
Threads = Annotated[
    int | None,
    option(
        "CPU threads that torch may use; on a shared machine, your share",
        Heading.RUN,
        "N",
        default="torch's own choice",
    ),
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
