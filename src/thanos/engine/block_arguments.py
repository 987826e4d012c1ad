"""The arguments and return values of decoder blocks: separated, copied and compared."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from copy import copy
from typing import Any, NoReturn

import torch
from torch import Tensor


class Unread:
    """Placeholder for a value that a block returns in addition to its hidden states.

    A later block may receive it as an argument. Any use of it raises TypeError, because the loop does not keep the value.
    """

    def _refuse(self, *_: object) -> NoReturn:
        raise TypeError("values that a block returns in addition to its hidden states are not kept")

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


def mappings(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[MutableMapping[Any, Any]]:
    """Return the mappings among the arguments, in order."""
    return [value for value in (*args, *kwargs.values()) if isinstance(value, MutableMapping)]


def shared_values(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[dict[Any, Any]]:
    """Return the current contents of each mapping among the arguments."""
    return [dict(mapping) for mapping in mappings(args, kwargs)]


def changed_values(before: list[dict[Any, Any]], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[dict[Any, Any]]:
    """Return, for each mapping among the arguments, the entries that a block has stored in it.

    Args:
        before: :func:`shared_values` of the same arguments before the block ran.
        args: positional arguments.
        kwargs: keyword arguments.
    """
    return [
        {key: value for key, value in mapping.items() if key not in known or known[key] is not value}
        for known, mapping in zip(before, mappings(args, kwargs), strict=True)
    ]


def mapped(mapping: MutableMapping[Any, Any], values: dict[Any, Any]) -> MutableMapping[Any, Any]:
    """Return a copy of a mapping, of the same type, with other values for some keys."""
    result = copy(mapping)
    result.update(values)
    return result


def shapes(value: Any) -> Any:
    """Return the shape of a tensor, and those of the tensors in a tuple, list or mapping; None for other values."""
    if isinstance(value, MutableMapping):
        return {key: shapes(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [shapes(item) for item in value]
    return value.shape if isinstance(value, Tensor) else None


def joined(values: list[Any], of_two: Any) -> Any:
    """Build a batch's argument from the values of its sequences.

    Args:
        values: the argument's value for each sequence.
        of_two: the argument's :func:`shapes` for a batch of two sequences.
    """
    first = values[0]
    if isinstance(first, MutableMapping):
        # A key that is not in the shapes was stored by a block: one part for each sequence.
        parts = {
            key: joined([one[key] for one in values], of_two[key])
            if key in of_two
            else concatenated([o[key] for o in values])
            for key in first
        }
        return mapped(first, parts)
    if isinstance(first, Tensor):
        if not all(value is first for value in values):
            return torch.cat(values)
        # An argument grows with the batch if its first dimension is twice as large for two sequences.
        grows = len(values) > 1 and first.dim() > 0 and of_two[0] == 2 * first.shape[0]
        if not grows:
            return first
        return first.expand(len(values), *first.shape[1:]) if first.shape[0] == 1 else torch.cat(values)
    if isinstance(first, tuple | list):
        return with_entries(first, [joined(list(items), part) for *items, part in zip(*values, of_two, strict=True)])
    return first


def concatenated(parts: Sequence[Any]) -> Any:
    """Return a value of a batch from its :func:`split` parts."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    if isinstance(first, tuple | list):
        return with_entries(first, [concatenated(items) for items in zip(*parts, strict=True)])
    return first


def split(value: Any, count: int) -> list[Any]:
    """Return the parts of a value of a batch, one for each of ``count`` sequences.

    A tensor is divided along its first dimension into views, and so are those in a tuple or list. Other values are the same in
    all parts.
    """
    if isinstance(value, Tensor):
        return list(value.split(len(value) // count))
    if isinstance(value, tuple | list):
        items = [split(item, count) for item in value]
        return [with_entries(value, [item[number] for item in items]) for number in range(count)]
    return [value] * count


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
