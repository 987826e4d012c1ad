"""Descriptions of a recipe's settings: one description serves the command's options and a study's axes."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

TEXT_SOURCES = (
    "wikitext2, c4 (both from the hub), pydoc, or local .txt, .jsonl, .json (both also .gz) or .parquet files: one, "
    "several separated by commas, a folder, or a glob such as 'data/*.jsonl'; FILE:NAME names the column"
)
"""The sources of text for calibration and evaluation, in words."""


class Heading(StrEnum):
    """The headings of a command's options, in the order in which they are shown."""

    WHAT = "What to prune"
    METHOD = "Method and sparsity"
    REPAIR = "Repair"
    RECOVERY = "Recovery"
    CALIBRATION = "Calibration"
    SIZES = "Sizes of the model"
    LAYER = "Layer and timing"
    PERPLEXITY = "Perplexity"
    TASKS = "Accuracy on tasks"
    PACKING = "What to pack"
    DECODING = "What to time"
    COMPARISON = "What to compare"
    CHECKS = "What to check"
    RUN = "Where and how it runs"
    OUTPUT = "Output"


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """The description of one setting.

    Attributes:
        help: meaning of the setting in one line, without a full stop.
        heading: heading under which the command's help shows the setting.
        metavar: unit or kind of the value, in capitals; empty for a setting that is true or false.
        lowest: smallest allowed value; None if the setting has another lower bound, or none.
        above: exclusive lower bound.
        highest: largest allowed value; None if the setting has another upper bound, or none.
        below: exclusive upper bound.
        choices: function that returns the allowed values, called when they are needed; None if they cannot be listed.
        default: the default in words, if the field's value does not explain it; empty to show the value.
    """

    help: str
    heading: Heading
    metavar: str = ""
    lowest: float | None = None
    above: float | None = None
    highest: float | None = None
    below: float | None = None
    choices: Callable[[], Iterable[str]] | None = None
    default: str = ""

    @property
    def bounds(self) -> str:
        """The bounds in words, as a recipe's error messages state them; empty without bounds."""
        bounds = {"at least": self.lowest, "above": self.above, "at most": self.highest, "below": self.below}
        return " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)

    def allows(self, number: float) -> bool:
        """Return whether a number is finite and within the bounds."""
        return (
            (self.lowest is None or number >= self.lowest)
            and (self.above is None or number > self.above)
            and (self.highest is None or number <= self.highest)
            and number < (float("inf") if self.below is None else self.below)
        )


_KEY = "setting"


def setting(value: Any, help: str, heading: Heading, metavar: str = "", **others: Any) -> Any:
    """Return a dataclass field with a default value and a description; ``others`` are further fields of :class:`Setting`."""
    described = Setting(help=help, heading=heading, metavar=metavar, **others)
    return field(default=value, metadata={_KEY: described})


def settings_of(owner: type[Any]) -> dict[str, Setting]:
    """Return the described fields of a dataclass by name, in order, each with its default in words."""
    return {
        f.name: dataclasses.replace(f.metadata[_KEY], default=f.metadata[_KEY].default or words(f.default))
        for f in dataclasses.fields(owner)
        if _KEY in f.metadata
    }


def flags_with_off(owner: type[Any]) -> set[str]:
    """Return the names of the described flags for which false and no value differ: those that are true or None by default."""
    hints, described = typing.get_type_hints(owner), settings_of(owner)
    on = {f.name for f in dataclasses.fields(owner) if f.default is True}
    return {name for name in described if hints[name] == bool | None or name in on}


def value_types(owner: type[Any]) -> dict[str, tuple[type[Any], bool]]:
    """Return field name → (type without None, whether the field holds several values of it), for described fields.

    A field that takes a word or a number has the type ``str``.
    """
    hints = typing.get_type_hints(owner)
    return {name: _value_type(hints[name]) for name in settings_of(owner)}


def _value_type(hint: Any) -> tuple[type[Any], bool]:
    if isinstance(hint, types.UnionType):
        kinds = [one for one in typing.get_args(hint) if one is not types.NoneType]
        hint = kinds[0] if len(kinds) == 1 else str
    arguments = typing.get_args(hint)
    return (arguments[0], True) if arguments else (hint, False)


def words(value: Any) -> str:
    """Return a default value as the help shows it."""
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def either(names: Iterable[str]) -> str:
    """Return ``a, b or c``."""
    return _joined(names, "or")


def in_words(names: Iterable[str]) -> str:
    """Return ``a, b and c``."""
    return _joined(names, "and")


def _joined(names: Iterable[str], word: str) -> str:
    *others, last = names
    return f"{', '.join(others)} {word} {last}" if others else last
