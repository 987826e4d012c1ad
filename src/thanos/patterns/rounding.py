"""Counts from fractions, robust against floating-point rounding."""

from __future__ import annotations

import math

_SLACK = 1e-9
"""Tolerance, relative to values above 1: a product that misses a whole number only by rounding counts as that number.

For example, 0.29 · 100 is 28.999999999999996 in floats, and its floor has to be 29."""


def floor_count(value: float) -> int:
    """Return ⌊value⌋, where a value within the tolerance below a whole number counts as that number."""
    return math.floor(value + _SLACK * max(1.0, value))


def ceil_count(value: float) -> int:
    """Return ⌈value⌉, where a value within the tolerance above a whole number counts as that number."""
    return math.ceil(value - _SLACK * max(1.0, value))
