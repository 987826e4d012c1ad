"""The arguments and return values of decoder blocks: separated, copied and compared."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, NoReturn

import torch
from torch import Tensor


class Unread:
    """Placeholder for a value that a block returns in addition to its hidden states.

    A later block may receive it as an argument. Any use of it raises TypeError, because the loop does not keep the value.
    """

    def _refuse(self, *_: object) -> NoReturn:
        raise TypeError("what a block returns beside its hidden states is not kept")

    __getattr__ = __getitem__ = __bool__ = __len__ = __iter__ = __add__ = __radd__ = __mul__ = __rmul__ = _refuse


UNREAD = Unread()

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any], str]:
    """Separate the hidden states from a block's other arguments.

    Return the hidden states, the other positional arguments, the other keyword arguments, and the hidden states' keyword
    (empty if they are positional).
    """
    if "hidden_states" in kwargs or (kwargs and not args):
        name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
        return kwargs[name], args, {key: value for key, value in kwargs.items() if key != name}, name
    return (args[0] if args else None), args[1:], kwargs, ""


def with_entries(like: Any, entries: list[Any]) -> Any:
    """Return a tuple, list or named tuple of the type of ``like`` with other entries."""
    make = getattr(type(like), "_make", type(like))  # a named tuple takes its fields one by one
    return make(entries)


def unread(value: Any) -> Any:
    """Return a value that a block returned, with every part that is not a plain value replaced by :data:`UNREAD`."""
    if isinstance(value, tuple | list):
        return with_entries(value, [unread(item) for item in value])
    return value if value is None or isinstance(value, bool | int | float | str) else UNREAD


def holds_unread(value: Any) -> bool:
    """Return whether a value, or an entry of a mapping, tuple or list in it, is :data:`UNREAD`."""
    if isinstance(value, MutableMapping):
        value = list(value.values())
    return any(map(holds_unread, value)) if isinstance(value, tuple | list) else value is UNREAD


def copied(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Return a copy of arguments that later writes do not change; mappings are not copied."""
    return tuple(map(_copy, args)), {name: _copy(value) for name, value in kwargs.items()}


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return [_copy(item) for item in value] if isinstance(value, tuple | list) else value


def shared_values(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[dict[Any, int]]:
    """Return the contents of each mapping among the arguments, as key → ``id`` of the value."""
    found = [value for value in (*args, *kwargs.values()) if isinstance(value, MutableMapping)]
    return [{key: id(item) for key, item in mapping.items()} for mapping in found]


def same_arguments(one: Arguments, other: Arguments) -> bool:
    """Return whether two calls have the same arguments; see :func:`_same`."""
    named, others = one[1], other[1]
    return _same(one[0], other[0]) and named.keys() == others.keys() and all(_same(named[k], others[k]) for k in named)


def _same(one: Any, other: Any) -> bool:
    """Return whether arguments are equal: tensors, sequences, numbers and strings by value, any other object by its type."""
    if isinstance(one, Tensor):
        return (
            isinstance(other, Tensor)
            and one.shape == other.shape
            and one.dtype == other.dtype
            and bool(torch.allclose(one, other, rtol=0, atol=0, equal_nan=True))
        )
    if isinstance(one, tuple | list):
        return isinstance(other, tuple | list) and len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, bool | int | float | str):
        return one == other
    return type(one) is type(other)
