"""Figures with two numeric axes: lines over a setting, and scatters of accuracy against cost."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any, Literal

from thanos.study.report.figures.axes import (
    bare,
    caption,
    decimal_ticks,
    draw_reference,
    legend,
    log_note,
    look_of,
    other_methods,
    tick_text,
)
from thanos.study.report.figures.charts import Chart, Point
from thanos.study.report.figures.theme import GRID, MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DASHES = ("-", (0, (5, 1.6)), (0, (1.4, 1.4)), (0, (5, 1.4, 1.2, 1.4)), (0, (9, 2)), (0, (2.5, 2.5)))
_FRONT: dict[str, Any] = {"color": MUTED, "linewidth": 1, "linestyle": (0, (4, 2))}
_RING: dict[str, Any] = {"marker": "o", "markersize": 9.5, "markerfacecolor": "none", "markeredgecolor": MUTED}
_SIDE_STEP = 0.0215
"""Horizontal shift of the points of a line against those of the next, as a fraction of the x axis: a marker and a gap."""

_APART = 6.0
"""Least distance in points between two markers of a scatter: a marker's width and a gap."""

_AXES = {"x": 270.0, "y": 130.0}
"""Size in points of the rectangle with a scatter's points."""

_ROW = 11.0
"""Distance in points between rows of markers above the axes: a ring's height and a gap."""


def draw_plane(canvas: Any, axes: Axes, chart: Chart) -> None:
    """Draw lines, or a scatter with its Pareto front. Points above the chart's ceiling are in rows above the axes."""
    from matplotlib.lines import Line2D

    others, handles, rows = other_methods(chart), [], 0
    seen: Counter[str] = Counter()
    shifts = _shifts(chart)
    _scales(axes, chart)
    for series, positions in zip(chart.series, _side_by_side(chart), strict=True):
        look = look_of(series.style, others, seen[series.style])
        seen[series.style] += 1
        line = {"color": look["color"], "linestyle": _DASHES[series.variant % len(_DASHES)]}
        points = list(zip(positions, series.points, strict=True))
        above = [(x, point) for x, point in points if chart.is_above(point)]
        if chart.kind == "lines":
            axes.plot(positions, [point.y.scaled for point in series.points], **line, zorder=2)
        for x, point in points:
            if not chart.is_above(point):
                _mark(canvas, axes, x, point, look, shifts.get(id(point), 0.0))
        if above:
            rows += 1
            _row_above(canvas, axes, rows, above, look)
        numbers = f" ↑ {', '.join(point.y.text for _, point in above)}" if above else ""
        shown = {**look, **line} if chart.kind == "lines" else look
        handles.append(Line2D([], [], **shown, label=series.label + numbers))
    bare(axes)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    caption(axes, chart.y_label + log_note(chart.scale("y")), rows * _ROW)
    axes.set_xlabel(chart.x_label + log_note(chart.scale("x")), fontsize=8)
    if chart.kind == "scatter":
        handles += _front(canvas, axes, chart, shifts)
    elif len(handles) == 1:
        handles = []  # no legend: the title names the only line
    if chart.reference is not None:
        handles.append(draw_reference(axes.axhline, chart.reference))
    _limits(axes, chart)
    legend(canvas, handles)


def _side_by_side(chart: Chart) -> list[list[float]]:
    """Return the x at which each series' points are drawn. Lines are shifted, so that points of equal x do not overlap."""
    positions = [[point.x.scaled for point in series.points] for series in chart.series]
    every = [x for each in positions for x in each]
    if chart.kind != "lines" or len(positions) < 2 or min(every) == max(every):
        return positions
    log = chart.scale("x") != "linear"  # a shift on a logarithmic axis is a factor
    span = math.log(max(every) / min(every)) if log else max(every) - min(every)
    steps = [_SIDE_STEP * span * (index - (len(positions) - 1) / 2) for index in range(len(positions))]
    return [
        [x * math.exp(step) if log else x + step for x in each] for each, step in zip(positions, steps, strict=True)
    ]


def _mark(canvas: Any, axes: Axes, x: float, point: Point, look: dict[str, Any], shift: float) -> None:
    """Draw a marker with its bar. If it is shifted, a line connects it to its true position."""
    y, spread = point.y.scaled, point.spread
    if not shift:
        axes.plot([x], [y], **look, clip_on=False, zorder=4)
        if spread is not None:
            bar = {"color": look["color"], "elinewidth": 1, "capsize": 2, "zorder": 3}
            axes.errorbar(x, y, yerr=spread.scaled, **bar)
        return
    style = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=(x, y), xytext=(shift, 0), textcoords="offset points", arrowprops=style, annotation_clip=False)
    _moved(canvas, axes, shift, [x], [y], **look, zorder=4)
    if spread is not None:
        ends = [y - spread.scaled, y + spread.scaled]
        _moved(canvas, axes, shift, [x, x], ends, color=look["color"], linewidth=1, marker="_", markersize=4, zorder=3)
        axes.update_datalim([(x, end) for end in ends])


def _moved(canvas: Any, axes: Axes, shift: float, xs: list[float], ys: list[float], **look: Any) -> None:
    """Draw a line or marker, shifted to the right by some points. The axes' limits are those without the shift."""
    from matplotlib.lines import Line2D
    from matplotlib.transforms import ScaledTranslation

    shifted = axes.transData + ScaledTranslation(shift / 72, 0, canvas.dpi_scale_trans)
    axes.add_artist(Line2D(xs, ys, transform=shifted, clip_on=False, **look))
    axes.update_datalim([(xs[0], ys[0])])
    axes.autoscale_view()


def _shifts(chart: Chart) -> dict[int, float]:
    """Return the shift to the right, in points, of each marker of a scatter that would overlap another marker or its bar.

    It is the smallest one in either direction; a negative shift is to the left. Distances are computed for axes of the usual
    size; the labels of an axis change them by only a few points.
    """
    if chart.kind != "scatter":
        return {}
    inside = [point for series in chart.series for point in series.points if not chart.is_above(point)]
    positions = _in_points(chart, "x", [point.x.scaled for point in inside])
    ends = _in_points(chart, "y", [end for point in inside for end in _ends(chart, point)])
    found: dict[int, float] = {}
    taken: list[tuple[float, float, float]] = []
    for point, x, low, high in zip(inside, positions, ends[::2], ends[1::2], strict=True):
        shift = 0.0
        while any(
            math.hypot(x + shift - other, max(low - top, bottom - high, 0.0)) < _APART for other, bottom, top in taken
        ):
            shift = -shift if shift > 0 else 1.0 - shift
        taken.append((x + shift, low, high))
        if shift:
            found[id(point)] = shift
    return found


def _ends(chart: Chart, point: Point) -> tuple[float, float]:
    """Return the lower and the upper end of a point's bar; without a bar both are y."""
    y, spread = point.y.scaled, 0.0 if point.spread is None else point.spread.scaled
    below = y - spread
    return below if below > 0 or chart.scale("y") == "linear" else y, y + spread


def _in_points(chart: Chart, axis: Literal["x", "y"], values: list[float]) -> list[float]:
    """Return the positions of values along an axis, in typographic points."""
    if chart.scale(axis) != "linear":
        values = [math.log(value) for value in values]
    span = max(values, default=0.0) - min(values, default=0.0)
    return [(value - min(values)) / span * _AXES[axis] if span else 0.0 for value in values]


def _row_above(canvas: Any, axes: Axes, row: int, points: list[tuple[float, Point]], look: dict[str, Any]) -> None:
    """Draw the markers of one series above the ceiling, in a separate row. Marked points have a ring."""
    from matplotlib.transforms import ScaledTranslation

    transform = axes.get_xaxis_transform() + ScaledTranslation(0, (row - 0.3) * _ROW / 72, canvas.dpi_scale_trans)
    for x, point in points:
        axes.plot([x], [1], **look, transform=transform, clip_on=False)
        if point.marked:
            axes.plot([x], [1], **_RING, transform=transform, clip_on=False)


def _scales(axes: Axes, chart: Chart) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    points = [point for series in chart.series for point in series.points]
    names: tuple[Literal["x", "y"], ...] = ("x", "y")
    for name, axis in zip(names, (axes.xaxis, axes.yaxis), strict=True):
        values = [point.x.scaled if name == "x" else chart.height_of(point) for point in points]
        scale = chart.scale(name)
        if scale != "linear":
            (axes.set_xscale if name == "x" else axes.set_yscale)("log", base=2 if scale == "log2" else 10)
        if scale == "log":
            decimal_ticks(axis, values)
        else:
            axis.set_major_formatter(FuncFormatter(lambda value, _: tick_text(value)))
        if scale == "log2":
            axis.set_major_locator(FixedLocator(sorted(set(values))))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_locator(NullLocator())


def _limits(axes: Axes, chart: Chart) -> None:
    """Set limits with a margin around the points. A line above the ceiling is cut there."""
    axes.margins(x=0.08 if chart.kind == "scatter" else 0.03, y=0.09)
    if chart.kind == "lines" and chart.ceiling is not None:
        heights = [chart.height_of(point) for series in chart.series for point in series.points]
        heights += [] if chart.reference is None else [chart.reference[1].scaled]
        low, high = min(heights), chart.ceiling
        below = low * (low / high) ** 0.07 if chart.scale("y") == "log" else low - 0.07 * (high - low)
        axes.set_ylim(below, high)


def _front(canvas: Any, axes: Axes, chart: Chart, shifts: dict[int, float]) -> list[Any]:
    """Draw rings around the points of the Pareto front, join them, and return the front's legend handles, if any."""
    from matplotlib.lines import Line2D

    front = sorted((p for series in chart.series for p in series.points if p.marked), key=lambda p: p.x.scaled)
    if not front:
        return []
    inside = [(point.x.scaled, point.y.scaled) for point in front if not chart.is_above(point)]
    for point in front:
        if not chart.is_above(point):
            x, y, shift = point.x.scaled, point.y.scaled, shifts.get(id(point), 0.0)
            if shift:
                _moved(canvas, axes, shift, [x], [y], **_RING, zorder=2)
            else:
                axes.plot([x], [y], **_RING, clip_on=False, zorder=2)
    if len(front) > 1 and inside:
        top = axes.get_ylim()[1]
        axes.set_ylim(top=top)  # the front's line to a point above the axes ends at their upper edge
        line = [(point.x.scaled, top if chart.is_above(point) else point.y.scaled) for point in front]
        where = "pre" if chart.rising else "post"  # the best y for at least, or at most, this x
        axes.step(*zip(*line, strict=True), where=where, **_FRONT, zorder=1)
    return [Line2D([], [], **_FRONT, **{**_RING, "markersize": 7}, label="Pareto front")]
