"""Counts from fractions, robust against rounding of floats."""

from __future__ import annotations

import math

_SLACK = 1e-9
"""Keeps ⌊0.29 · 100⌋ at 29: a product that misses a whole number by rounding alone counts as that number."""


def floor_count(value: float) -> int:
    """Return ⌊value⌋, forgiving rounding in the product that made it."""
    return math.floor(value + _SLACK * max(1.0, value))


def ceil_count(value: float) -> int:
    """Return ⌈value⌉, forgiving rounding in the product that made it."""
    return math.ceil(value - _SLACK * max(1.0, value))
