"""Where labels go so that they cover neither points nor each other."""

from __future__ import annotations

import math
from collections.abc import Sequence

Box = tuple[float, float, float, float]
"""Left, bottom, right, top."""

Segment = tuple[tuple[float, float], tuple[float, float]]
"""From where to where a line is drawn."""

FAR = 9.0
"""A label farther from its point than this has a line to it."""

HALF_LINE = 5.0
"""Half the height of a label, and how far from a point's centre its marker is cleared."""


def spread_apart(wanted: list[float], gap: float, top: float) -> list[float]:
    """Return positions near the wanted ones, at least ``gap`` apart, in the same order, the highest at most at ``top``."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed = [0.0] * len(wanted)
    for rank, index in enumerate(order):
        placed[index] = wanted[index] if rank == 0 else max(wanted[index], placed[order[rank - 1]] + gap)
    ceiling = top
    for index in reversed(order):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - gap
    return placed


def place_label(
    place: tuple[float, float],
    width: float,
    taken: list[Box],
    others: list[tuple[float, float]],
    bounds: Box,
    leaders: Sequence[Segment] = (),
) -> Box:
    """Return the box of a label of one point.

    Args:
        place: of the point.
        width: of the label.
        taken: boxes that neither it nor the line to its point may cover.
        others: places of the other points; it must be nearer to its own.
        bounds: what it must stay within.
        leaders: lines from other labels to their points, which it must not cover.
    """
    x, y = place
    boxes = [(x + dx, y + dy - HALF_LINE, x + dx + width, y + dy + HALF_LINE) for dx, dy in _offsets(width)]
    inside = [b for b in boxes if b[0] >= bounds[0] and b[1] >= bounds[1] and b[2] <= bounds[2] and b[3] <= bounds[3]]
    off = [box for box in inside if not any(_overlap(box, other) for other in taken)]
    free = [
        box
        for box in off
        if not any(crosses(line, box) for line in leaders)
        and not (needs_leader(box, place) and any(crosses(leader_of(box, place), other) for other in taken))
    ]
    clear = [box for box in free if all(distance(box, place) < distance(box, other) for other in others)]
    # In a crowd: near another point, then over another label, but never cut off.
    return next(iter([*clear, *free, *off, *inside, *boxes]))


def distance(box: Box, place: tuple[float, float]) -> float:
    """Return how far a box is from a point; 0 inside."""
    x, y = place
    return math.hypot(max(box[0] - x, 0.0, x - box[2]), max(box[1] - y, 0.0, y - box[3]))


def needs_leader(box: Box, place: tuple[float, float]) -> bool:
    """Tell whether a label is so far from its point that a line must join them."""
    return distance(box, place) > FAR


def leader_of(box: Box, place: tuple[float, float]) -> Segment:
    """Return the line from a label's middle to its point."""
    return ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), place


def crosses(line: Segment, box: Box) -> bool:
    """Tell whether a line passes through a box."""
    (x, y), (to_x, to_y) = line
    enter, leave = 0.0, 1.0
    for start, step, low, high in ((x, to_x - x, box[0], box[2]), (y, to_y - y, box[1], box[3])):
        if step == 0:
            if not low < start < high:
                return False
            continue
        first, last = sorted(((low - start) / step, (high - start) / step))
        enter, leave = max(enter, first), min(leave, last)
    return enter < leave


def _offsets(width: float) -> list[tuple[float, float]]:
    near = [(8.0, 0.0), (-8 - width, 0.0), (-width / 2, 11.0), (-width / 2, -11.0)]
    corners = [(6.0, 10.0), (6.0, -10.0), (-6 - width, 10.0), (-6 - width, -10.0)]
    far = [
        (x, y)
        for y in (20.0, -20.0, 30.0, -30.0, 40.0, -40.0)
        for x in (6.0, -width / 2, -6 - width, 20.0, -20 - width)
    ]
    return [*near, *corners, *far]


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
