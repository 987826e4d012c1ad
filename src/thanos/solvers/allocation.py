"""Sparsities of layers that minimise the sum of their weighted errors, at a fixed number of zeros.

docs/math.md derives the method. A layer's error is known at a few sparsities. Between them it is interpolated, and the lower
convex hull of the result is used. A sum of convex functions with one linear constraint is minimised greedily: the cheapest
piece of any layer is taken next, until the total is reached.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

_PIECES = 10
"""Number of pieces into which each interval between two measured sparsities is divided."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A layer's error as a function of its number of zeros.

    Attributes:
        size: number of entries of the layer.
        sparsities: fractions of zeros at which the error is known, ascending, in [0, 1], at least one. The first and the last
            are the bounds of the allocation.
        errors: the error at each of them, at least 0.
        gain: weight of the layer's error in the sum, at least 0.
    """

    size: int
    sparsities: tuple[float, ...]
    errors: tuple[float, ...]
    gain: float = 1.0

    def __post_init__(self) -> None:
        ascending = all(low < high for low, high in pairwise(self.sparsities))
        if not self.sparsities or len(self.sparsities) != len(self.errors) or not ascending or self.size < 0:
            raise ValueError(f"a curve needs ascending sparsities with an error each; got {self}")
        if not (self.sparsities[0] >= 0 and self.sparsities[-1] <= 1):
            raise ValueError(f"sparsities are in [0, 1]; got {self.sparsities}")
        if not all(math.isfinite(value) and value >= 0 for value in (*self.errors, self.gain)):
            raise ValueError(f"errors and gain are finite and at least 0; got {self.errors}, {self.gain}")

    @property
    def counts(self) -> tuple[int, ...]:
        """The sparsities as whole numbers of zeros, rounded to the nearest."""
        return tuple(round(sparsity * self.size) for sparsity in self.sparsities)


def allocate(curves: Sequence[Curve], total: int, *, pieces: int = _PIECES) -> list[int]:
    """Return the number of zeros of each layer: the numbers that minimise Σ gain·error and add up to ``total``.

    Between two measured sparsities the error is interpolated at ``pieces`` − 1 points, geometrically, since errors grow by a
    nearly constant factor. The result is exact for the lower convex hull of these points, linear between them. It does not
    depend on the order of the layers, except that among equally cheap pieces those of earlier layers come first.

    Args:
        curves: the layers' errors.
        total: number of zeros of all layers together.
        pieces: number of pieces between two measured sparsities; 1 for a straight line.

    Raises:
        ValueError: the bounds of the curves do not allow the total.
    """
    hulls = [lower_hull(_refined(curve, pieces)) for curve in curves]
    zeros = [hull[0][0] for hull in hulls]
    most = sum(hull[-1][0] for hull in hulls)
    if not sum(zeros) <= total <= most:
        raise ValueError(f"the curves allow {sum(zeros):,} to {most:,} zeros, not {total:,}")
    left = total - sum(zeros)
    steps = sorted(
        ((gain_per_zero * curve.gain, index, stop - start))
        for index, (curve, hull) in enumerate(zip(curves, hulls, strict=True))
        for start, stop, gain_per_zero in _slopes(hull)
    )
    # The slopes of one hull ascend, so that a layer's pieces are taken from left to right.
    for _, index, width in steps:
        taken = min(width, left)
        zeros[index] += taken
        left -= taken
    return zeros


def lower_hull(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return the lower convex hull of points (x, y) with ascending x: the vertices from the first to the last point."""
    hull: list[tuple[int, float]] = []
    for x, y in points:
        # Drop the last vertex while it lies on or above the line from the one before it to the new point.
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    return hull


def _slopes(hull: Sequence[tuple[int, float]]) -> list[tuple[int, int, float]]:
    """Return (first x, last x, slope) of each edge, with slopes that ascend in spite of rounding."""
    edges, steepest = [], -math.inf
    for (x0, y0), (x1, y1) in pairwise(hull):
        steepest = max(steepest, (y1 - y0) / (x1 - x0))
        edges.append((x0, x1, steepest))
    return edges


def _refined(curve: Curve, pieces: int) -> list[tuple[int, float]]:
    """Return (zeros, error) at the measured sparsities and between them, without repeated numbers of zeros."""
    points = {curve.counts[0]: curve.errors[0]}
    measured = list(zip(curve.counts, curve.errors, strict=True))
    for (x0, y0), (x1, y1) in pairwise(measured):
        for piece in range(1, pieces + 1):
            x = x0 + (x1 - x0) * piece // pieces
            part = (x - x0) / (x1 - x0) if x1 > x0 else 1.0
            # A geometric mean needs positive errors; else the interpolation is linear.
            between = y0 ** (1 - part) * y1**part if y0 > 0 and y1 > 0 else y0 + (y1 - y0) * part
            points[x] = y1 if piece == pieces else between
    return sorted(points.items())
