"""The allocation of zeros to layers, against a search over all allocations."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thanos.solvers.allocation import Curve, allocate, lower_hull

QUICK = settings(max_examples=80, deadline=None, derandomize=True)


def at(points: list[tuple[int, float]], x: int) -> float:
    """The value at x, linear between the points."""
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    assert x == points[0][0]
    return points[0][1]


def hull_at(points: list[tuple[int, float]], x: int) -> float:
    """The lower convex hull at x: the lowest chord over it."""
    chords = [
        y0 if x0 == x1 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
        for (x0, y0), (x1, y1) in itertools.combinations_with_replacement(points, 2)
        if x0 <= x <= x1 and (x0 < x1 or x0 == x)
    ]
    return min(chords)


def best(functions: list[dict[int, float]], total: int) -> float:
    """The least sum over all allocations, by dynamic programming over the layers."""
    sums = {0: 0.0}
    for function in functions:
        later: dict[int, float] = {}
        for (spent, cost), (x, y) in itertools.product(sums.items(), function.items()):
            later[spent + x] = min(later.get(spent + x, math.inf), cost + y)
        sums = later
    return sums[total]


@st.composite
def curves(draw) -> Curve:
    size = draw(st.integers(0, 12))
    counts = sorted(draw(st.sets(st.integers(0, 12), min_size=1, max_size=5)))
    errors = draw(
        st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.7, 1.0, 3.0]), min_size=len(counts), max_size=len(counts))
    )
    gain = draw(st.sampled_from([0.0, 0.5, 1.0, 2.0]))
    return Curve(size, tuple(count / 12 for count in counts), tuple(errors), gain)


@QUICK
@given(st.lists(curves(), min_size=1, max_size=4), st.data())
def test_no_allocation_has_a_smaller_sum(layers, data):
    hulls = []
    for curve in layers:
        points = sorted(dict(zip(curve.counts, curve.errors, strict=True)).items())
        hulls.append({x: hull_at(points, x) for x in range(points[0][0], points[-1][0] + 1)})
    low, high = sum(min(hull) for hull in hulls), sum(max(hull) for hull in hulls)
    total = data.draw(st.integers(low, high))
    found = allocate(layers, total, pieces=1)
    assert sum(found) == total
    cost = sum(curve.gain * hull[x] for curve, hull, x in zip(layers, hulls, found, strict=True))
    weighted = [{x: c.gain * y for x, y in hull.items()} for c, hull in zip(layers, hulls, strict=True)]
    assert cost == pytest.approx(best(weighted, total), rel=1e-9, abs=1e-12)


@QUICK
@given(st.lists(st.tuples(st.integers(0, 20), st.sampled_from([0.0, 1.0, 2.0, 5.0])), min_size=1, max_size=8))
def test_the_hull_is_the_lowest_chord(points):
    points = sorted(dict(points).items())
    hull = lower_hull(points)
    assert set(hull) <= set(points)
    assert (hull[0], hull[-1]) == (points[0], points[-1])
    for x in range(points[0][0], points[-1][0] + 1):
        assert at(hull, x) == pytest.approx(hull_at(points, x))


def test_equal_layers_get_equal_sparsities_and_a_heavier_one_fewer_zeros():
    sparsities, errors = (0.3, 0.4, 0.5, 0.6, 0.7), (0.01, 0.02, 0.04, 0.08, 0.16)
    same = Curve(1000, sparsities, errors)
    assert allocate([same, same], 1000) in ([500, 500], [510, 490], [490, 510])
    heavy, light = allocate([Curve(1000, sparsities, errors, 4.0), same], 1000)
    # Errors double every 0.1, so that a gain of 4 moves the two layers 0.2 apart: equal slopes, to one piece of 0.01.
    assert (heavy + light, abs(light - heavy - 200) <= 20) == (1000, True)


def test_sizes_matter_through_the_slope_per_zero():
    """With equal error curves over the sparsity, a small layer's zero costs more, so that a large layer takes more."""
    sparsities, errors = (0.3, 0.5, 0.7), (0.01, 0.04, 0.16)
    small, large = Curve(100, sparsities, errors), Curve(1000, sparsities, errors)
    found = allocate([small, large], 550)
    assert sum(found) == 550
    assert found[0] / 100 < 0.5 < found[1] / 1000


def test_the_bounds_are_kept_and_refused_when_impossible():
    curve = Curve(100, (0.4, 0.6), (0.1, 0.2))
    assert allocate([curve, Curve(100, (0.4, 0.6), (0.1, 9.0))], 100) == [60, 40]
    assert allocate([curve], 40) == [40]
    assert allocate([], 0) == []
    for total in (39, 61):
        with pytest.raises(ValueError, match=f"allow 40 to 60 zeros, not {total}"):
            allocate([curve], total)


@pytest.mark.parametrize(
    "wrong",
    [
        {"sparsities": ()},
        {"sparsities": (0.5, 0.4)},
        {"errors": (0.1,)},
        {"errors": (0.1, math.nan)},
        {"errors": (-0.1, 0.1)},
        {"gain": -1.0},
        {"sparsities": (0.5, 1.1)},
    ],
)
def test_a_wrong_curve_is_refused(wrong):
    values = {"size": 10, "sparsities": (0.4, 0.5), "errors": (0.1, 0.2)} | wrong
    with pytest.raises(ValueError):
        Curve(**values)
