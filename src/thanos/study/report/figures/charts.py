"""The contents of a figure as plain data. draw.py draws it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any, Literal

from thanos.study.report.numbers import Number, Prose

SPAN_FOR_LOG = 8.0
"""An axis with scale ``auto`` is logarithmic, and labelled so, if its largest number is more than this many times its
smallest."""


FAR = 3.0
"""A point of a scatter is drawn above the axes if its y is more than this many times the median."""


ROOM = 1.6
"""Lines of a capped chart end at this many times the second lowest of their peaks."""


@dataclass(frozen=True, slots=True)
class Point:
    """One point. The spread is that of y, which ``dots`` draws horizontally.

    ``style`` is the method whose style the point has; empty for that of its series.
    """

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
        label: label in the legend.
        style: method whose colour and marker the series has.
        points: points sorted by x.
        variant: number of the setting of a method. It selects the line style: 0 is a solid line, others are dashed.
    """

    label: str
    style: str
    points: tuple[Point, ...]
    variant: int = 0


@dataclass(frozen=True, slots=True)
class Chart:
    """Series on two axes.

    Attributes:
        kind: ``lines`` joins the points, ``scatter`` joins the marked ones (the Pareto front). ``dots`` draws each point in a
            separate line: label to the left, number to the right. The series' label is above its first point.
        name: name of its files, without ending.
        title: title of the figure.
        x_label, y_label: labels of the axes, with units.
        reference: a number to compare y with, such as the dense model's, and its label.
        x_scale: ``linear``, ``log`` or ``log2``; ``auto`` is log if the numbers span more than :data:`SPAN_FOR_LOG`.
        note: text below the figure in the page.
        capped: whether lines end at :attr:`ceiling`.
        rising: whether larger x are better, such as tokens per second.
        directed: whether larger y are better; then there is no :attr:`ceiling`.
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
    rising: bool = False
    directed: bool = False

    @property
    def ceiling(self) -> float | None:
        """The largest y inside the axes; None without a limit.

        In a scatter a far point would compress the others, so the limit is :data:`FAR` times the median. Capped lines end at
        :data:`ROOM` times the second lowest of their peaks, so that at least two lines are visible as a whole. Points above
        the limit are drawn above the axes, with their numbers in the legend.
        """
        values = [p.y.scaled for series in self.series for p in series.points]
        if self.kind == "scatter" and len(values) > 2 and not self.directed:
            limit = FAR * statistics.median(values)
        elif self.kind == "lines" and self.capped and len(self.series) > 2:
            limit = ROOM * sorted(max(p.y.scaled for p in series.points) for series in self.series if series.points)[1]
        else:
            return None
        return limit if max(values) > limit else None

    def is_above(self, point: Point) -> bool:
        """Whether a point is above the ceiling."""
        return self.ceiling is not None and point.y.scaled > self.ceiling

    def height_of(self, point: Point) -> float:
        """Return a point's y, at most the ceiling."""
        return point.y.scaled if self.ceiling is None else min(point.y.scaled, self.ceiling)

    def scale(self, axis: Literal["x", "y"]) -> str:
        """Return ``linear``, ``log`` or ``log2``; ``auto`` is resolved. The scale of y is always ``auto``."""
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
        """Return plain values for the SVG's metadata and the page."""
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
        name, title, note: as in :class:`Chart`.
        label: label of the colour scale.
        kinds: names of the columns.
        blocks: names of the rows.
        values: numbers, blocks × kinds; None for a layer that was not pruned.
    """

    name: str
    title: str
    label: str
    kinds: tuple[str, ...]
    blocks: tuple[str, ...]
    values: tuple[tuple[Number | None, ...], ...]
    note: Prose = ()

    def scale(self) -> str:
        """Return ``log`` if the largest number is more than :data:`SPAN_FOR_LOG` times the smallest, else ``linear``."""
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
