"""The commands' options: those made from the fields of a recipe, and others that several commands have."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from thanos.errors import UserError
from thanos.recipe import Recipe
from thanos.recovery.recipe import RecoveryRecipe
from thanos.settings import Heading, Setting, either, flags_with_off, settings_of, value_types

NUMBERS = {"FRACTION": float, "RATE": float, "N": int, "TOKENS": int, "COLUMNS": int}
"""Metavar → type of the option's value."""

SETTINGS, _WITH_OFF = settings_of(Recipe), flags_with_off(Recipe) | flags_with_off(RecoveryRecipe)

WORDS_TOO = [
    f"--{name.replace('_', '-')}"
    for owner in (Recipe, RecoveryRecipe)
    for name, (kind, _) in value_types(owner).items()
    if kind is str
]
"""Options whose value may be a word, such as auto, whatever their metavar. The recipe checks it."""

C = TypeVar("C", bound=Callable[..., None])


def option(text: str, heading: Heading, metavar: str | None, *names: str, default: str | None = None) -> Any:
    """Return an option; :class:`~thanos.cli.arguments.Command` adds the default to its help text.

    Args:
        text: help text, without a full stop.
        heading: heading of the option in the help.
        metavar: unit or kind of the value; None for a flag.
        names: names of the option. Required if the metavar is the name in capitals: older releases of the argument parser
            then take the metavar for the name.
        default: default in words; None to show the parameter's.
    """
    return typer.Option(*names, help=text, metavar=metavar, show_default=default or True, rich_help_panel=heading)


def with_settings(
    *names: str,
    owner: type[Any] = Recipe,
    repeated: Collection[str] = (),
    changed: Mapping[str, Mapping[str, Any]] | None = None,
) -> Callable[[C], C]:
    """Return a decorator that replaces a command's ``**settings`` by one option for each of these fields of a recipe.

    A setting that the user does not give is None, or False for a flag; see :func:`given`.

    Args:
        names: names of fields of ``owner``.
        owner: the recipe's class.
        repeated: names that may be given several times, although a recipe has one value.
        changed: name → attributes of :class:`~thanos.settings.Setting` that this command replaces.
    """

    def decorate(command: C) -> C:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        described, types = settings_of(owner), value_types(owner)
        made = [
            _parameter(name, replace(described[name], **(changed or {}).get(name, {})), types[name], repeated)
            for name in names
        ]
        ordered = sorted([*made, *own], key=lambda p: p.kind)  # a signature requires positional parameters first
        command.__signature__ = signature.replace(parameters=ordered)  # type: ignore[attr-defined]
        return command

    return decorate


def _parameter(
    name: str, described: Setting, type_of: tuple[type[Any], bool], repeated: Collection[str]
) -> inspect.Parameter:
    kind, several = type_of[0], type_of[1] or name in repeated
    text = described.help
    if described.choices is not None:
        text += f": {either(described.choices())}"
    if described.bounds:
        text += f", {described.bounds}"
    if several:
        text += "; may be repeated"
    flag, word = kind is bool and name not in _WITH_OFF, name.replace("_", "-")
    spelling = f"--{word}/--no-{word}" if name in _WITH_OFF else f"--{word}"
    annotation = Annotated[
        bool if flag else (list[kind] if several else kind) | None,
        option(text, described.heading, described.metavar or None, spelling, default=described.default),
    ]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=False if flag else None, annotation=annotation
    )


def given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that the command line sets, with values in the form of a recipe's."""
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in settings.items()
        if value is not None and (value is not False or name in _WITH_OFF) and value not in ([], ())
    }


def examples(*lines: tuple[str, str]) -> str:
    """Return the end of a command's help. Each line is a pair: the purpose of an example, and its command."""
    return "\n".join(f"  {what}:\n    {command}" for what, command in lines)


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A hub name, a local Hugging Face folder, or a .gguf file.", show_default=False
    ),
]
Quiet = Annotated[
    bool, option("Hide progress; notes and warnings are still shown", Heading.OUTPUT, None, "--quiet", "-q")
]
JsonFile = Annotated[
    Path | None, option("Write the result as JSON, - for the standard output", Heading.OUTPUT, "FILE", "--json")
]
Activations = Annotated[
    str,
    option(
        "Storage tier of the hidden states between blocks: device, host, disk, or auto (the first with enough room)",
        Heading.RUN,
        "TIER",
    ),
]
SequenceLength = Annotated[int, option("Tokens per window", Heading.PERPLEXITY, "TOKENS")]
MaxWindows = Annotated[int | None, option("Score only the first N windows", Heading.PERPLEXITY, "N", default="all")]
TaskFolder = Annotated[Path | None, option("Folder with lm_eval task files of your own", Heading.TASKS, "DIR")]
TaskLimit = Annotated[int | None, option("Only the first N documents of each task", Heading.TASKS, "N", default="all")]
Threads = Annotated[
    int | None,
    option(
        "Number of CPU threads for torch; lower it on a shared machine", Heading.RUN, "N", default="torch's default"
    ),
]

_MOST_THREADS = 1024


def resume_option(out: str) -> Any:
    """Return the option ``--resume`` of a command that writes the folder ``out``."""
    text = f"Continue an interrupted run of this command; start one if there is none, do nothing if {out} is complete"
    return option(text, Heading.RUN, None, "--resume", default="refuse an interrupted run")


def overwrite_option(text: str) -> Any:
    """Return the option ``--overwrite`` of a command that writes a folder."""
    return option(text, Heading.OUTPUT, None, "--overwrite", default="refuse")


def use_threads(threads: int | None) -> None:
    """Set the number of threads that torch uses for one operation, in this process; None keeps torch's default."""
    check_threads(threads)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def check_threads(threads: int | None) -> None:
    """Raise UserError for a number of threads below 1 or above 1024."""
    if threads is not None and not 1 <= threads <= _MOST_THREADS:
        raise UserError(
            f"--threads must be a whole number, 1 to {_MOST_THREADS}; got {threads}; best is at most the number of cores"
        )
