"""What a figure shows, as plain data; draw.py turns it into pictures."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any, Literal

from thanos.study.report.numbers import Number, Prose

SPAN_FOR_LOG = 8.0
"""An axis whose largest number is more than so many times its smallest is logarithmic, and says so."""


FAR = 3.0
"""Times the median above which a point of a scatter is drawn above the axes."""


ROOM = 1.6
"""Times the highest point of the second lowest line, where capped lines end."""


@dataclass(frozen=True, slots=True)
class Point:
    """One point: both coordinates from the store; the spread belongs to y (to x in ``dots``); its own style may differ."""

    x: Number
    y: Number
    spread: Number | None = None
    label: str = ""
    marked: bool = False
    style: str = ""


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one kind.

    Attributes:
        label: in the legend.
        style: the method whose colour and marker it has.
        points: in the order of x.
        variant: 0 has a full line and full markers; dashes and hollow markers tell other settings of a method apart.
    """

    label: str
    style: str
    points: tuple[Point, ...]
    variant: int = 0


@dataclass(frozen=True, slots=True)
class Chart:
    """Series on two axes.

    Attributes:
        kind: ``lines`` joins the points, ``scatter`` joins the marked ones (the Pareto front), ``dots`` gives each point a line
            of its own, its label to the left, its number to the right and its series' label above the first.
        name: of its files.
        title: what it shows.
        x_label, y_label: with units.
        reference: a number that y is read against, with its label: the dense model.
        x_scale: ``linear``, ``log`` or ``log2``; ``auto`` is log where the numbers span more than :data:`SPAN_FOR_LOG`.
        note: below the figure in the page.
        capped: lines end above at :attr:`ceiling`.
    """

    kind: Literal["lines", "scatter", "dots"]
    name: str
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    reference: tuple[str, Number] | None = None
    x_scale: Literal["linear", "log", "log2", "auto"] = "linear"
    note: Prose = ()
    capped: bool = False

    @property
    def ceiling(self) -> float | None:
        """The largest y inside the axes; None without a limit.

        A scatter's far point would press the others together, and capped lines end above the second lowest of their highest
        points, so that at least two lines are seen whole. What lies above is drawn above the axes, its number in the legend.
        """
        values = [p.y.scaled for series in self.series for p in series.points]
        if self.kind == "scatter" and len(values) > 2:
            limit = FAR * statistics.median(values)
        elif self.kind == "lines" and self.capped and len(self.series) > 2:
            limit = ROOM * sorted(max(p.y.scaled for p in series.points) for series in self.series if series.points)[1]
        else:
            return None
        return limit if max(values) > limit else None

    def is_above(self, point: Point) -> bool:
        """Tell whether a point lies above the ceiling."""
        return self.ceiling is not None and point.y.scaled > self.ceiling

    def height_of(self, point: Point) -> float:
        """Return a point's y, the ceiling for one above it."""
        return point.y.scaled if self.ceiling is None else min(point.y.scaled, self.ceiling)

    def scale(self, axis: Literal["x", "y"]) -> str:
        """Return ``linear``, ``log`` or ``log2``, the choice of ``auto`` being made; y is always ``auto``."""
        if axis == "x" and self.x_scale != "auto":
            return self.x_scale
        values = [(p.x if axis == "x" else p.y).scaled for series in self.series for p in series.points]
        if axis == "y" and self.ceiling is not None:
            values = [min(value, self.ceiling) for value in values]
        if axis == "y" and self.reference is not None:
            values.append(self.reference[1].scaled)
        spans = values and min(values) > 0 and max(values) > SPAN_FOR_LOG * min(values)
        return "log" if spans else "linear"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: what the SVG's metadata and the page carry."""
        return {
            "name": self.name,
            "title": self.title,
            "x": {"label": self.x_label, "scale": self.scale("x")},
            "y": {"label": self.y_label, "scale": self.scale("y")},
            "reference": None
            if self.reference is None
            else {"label": self.reference[0], **self.reference[1].to_dict()},
            "series": [{"label": s.label, "points": [_point(point) for point in s.points]} for s in self.series],
        }


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Numbers on a grid of decoder blocks (downwards) and kinds of layers (across).

    Attributes:
        name, title, note: as of a :class:`Chart`.
        label: of the colours.
        kinds: the columns' names.
        blocks: the rows' names.
        values: blocks × kinds; None where a layer was not pruned.
    """

    name: str
    title: str
    label: str
    kinds: tuple[str, ...]
    blocks: tuple[str, ...]
    values: tuple[tuple[Number | None, ...], ...]
    note: Prose = ()

    def scale(self) -> str:
        """Return ``log`` where the numbers span decades, else ``linear``."""
        known = [number.value for row in self.values for number in row if number is not None]
        return "log" if known and min(known) > 0 and max(known) > SPAN_FOR_LOG * min(known) else "linear"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "name": self.name,
            "title": self.title,
            "label": self.label,
            "scale": self.scale(),
            "kinds": list(self.kinds),
            "blocks": list(self.blocks),
            "values": [[None if number is None else number.to_dict() for number in row] for row in self.values],
        }


Figure = Chart | HeatMap


def _point(point: Point) -> dict[str, Any]:
    spread = {} if point.spread is None else {"spread": point.spread.to_dict()}
    label = {"label": point.label} if point.label else {}
    marked = {"marked": True} if point.marked else {}
    return {**label, "x": point.x.to_dict(), "y": point.y.to_dict(), **spread, **marked}
