"""The check of values against the descriptions of their settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Any

from thanos.errors import RecipeError
from thanos.settings import Setting, either, settings_of, value_types
from thanos.system.suggestions import near, near_number, near_whole


def check_settings(owner: type[Any], values: Mapping[str, Any]) -> None:
    """Refuse a value of another type than its field's, or one that the field's :class:`~thanos.settings.Setting` excludes.

    None is allowed for a field whose default is None.

    Args:
        owner: dataclass with described fields.
        values: name of a field → value.

    Raises:
        RecipeError: a value is refused; the message names the setting.
    """
    for name, value in values.items():
        described, kind, optional = _fields(owner)[name]
        if value is None and optional:
            continue
        if not _is_allowed(value, described, kind):
            allowed, hint = _allowed(value, described, kind, optional)
            raise RecipeError(f"{name} must be {allowed}; got {value!r}{hint}")


@cache
def _fields(owner: type[Any]) -> dict[str, tuple[Setting, type[Any], bool]]:
    """Return the name of each described field → (description, type without None, whether the default is None)."""
    described, types = settings_of(owner), value_types(owner)
    return {
        field.name: (described[field.name], types[field.name][0], field.default is None)
        for field in dataclasses.fields(owner)
        if field.name in described
    }


def _is_allowed(value: Any, described: Setting, kind: type[Any]) -> bool:
    if kind is bool:
        return isinstance(value, bool)
    if kind in (int, float):
        number = int if kind is int else int | float
        return isinstance(value, number) and not isinstance(value, bool) and described.allows(value)
    return value in _choices(described)


def _allowed(value: Any, described: Setting, kind: type[Any], optional: bool) -> tuple[str, str]:
    """Return the allowed values of a setting, and a hint for a value that is not allowed, in words."""
    if kind is bool:
        return "true, false or left out" if optional else "true or false", ""
    if kind is int:
        return f"a whole number, {described.bounds}", near_whole(value, described.allows)
    if kind is float:
        return f"a number, {described.bounds}", near_number(
            value, fraction=described.below == 1, allows=described.allows
        )
    return either(_choices(described)), near(value, _choices(described))


def _choices(described: Setting) -> tuple[str, ...]:
    assert described.choices is not None
    return tuple(described.choices())
