"""Setting entries to zero by a mask.

On the CPU by the entries' bits: choosing between two values there takes some ten times as long.
"""

from __future__ import annotations

import torch
from torch import Tensor

_IN_CACHE = 1 << 17
"""Entries handled at once on the CPU."""

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def clear_(values: Tensor, removed: Tensor) -> Tensor:
    """Set the entries that are ``removed`` (bool, of the same shape) to zero in place; return ``values``."""
    if values.device.type != "cpu":
        return values.masked_fill_(removed, 0.0)
    bits, rows = _BITS[values.element_size()], max(1, _IN_CACHE // max(1, values.shape[-1]))
    for some, gone in zip(values.view(bits).split(rows), removed.view(torch.int8).split(rows), strict=True):
        some.bitwise_and_(gone.sub(1).to(bits))  # False less one has every bit set
    return values


def without(values: Tensor, removed: Tensor) -> Tensor:
    """Return a copy with the removed entries set to zero."""
    return torch.where(removed, 0.0, values) if values.device.type != "cpu" else clear_(values.clone(), removed)


def only(values: Tensor, kept: Tensor) -> Tensor:
    """Return a copy in which every entry but those kept is zero."""
    return torch.where(kept, values, 0.0) if values.device.type != "cpu" else without(values, kept.logical_not())
