"""Figures with two axes: lines over a setting, and scatters of accuracy against cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from thanos import registry
from thanos.study.report.figures.axes import bare, caption, decimal_ticks, lay_out, other_methods, tick_text
from thanos.study.report.figures.charts import Chart, Point
from thanos.study.report.figures.labels import (
    HALF_LINE,
    Box,
    Segment,
    leader_of,
    needs_leader,
    place_label,
    spread_apart,
)
from thanos.study.report.figures.theme import GRID, MUTED, PAPER, style_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DASHES = ("-", (0, (5, 1.6)), (0, (1.4, 1.4)), (0, (5, 1.4, 1.2, 1.4)), (0, (9, 2)), (0, (2.5, 2.5)))
_AXES: tuple[Literal["x", "y"], ...] = ("x", "y")
_LINE = 11.0
"""Points between the baselines of two labels."""


def draw_plane(canvas: Any, axes: Axes, chart: Chart) -> None:
    """Draw lines, or a scatter with its Pareto front."""
    others = other_methods(chart)
    for series in chart.series:
        color, marker = style_of(series.style, others)
        x, y = [p.x.scaled for p in series.points], [_height_of(p, chart) for p in series.points]
        line = _DASHES[series.variant % len(_DASHES)] if chart.kind == "lines" else "none"
        if chart.kind == "lines" and chart.ceiling is not None:
            # The line leaves the figure where it would, and each point beyond has its mark at the edge.
            axes.plot(x, [p.y.scaled for p in series.points], color=color, linestyle=line, zorder=3)
            line = "none"
        axes.plot(x, y, color=color, marker=marker, linestyle=line, markeredgecolor="none", clip_on=False, zorder=3)
        for point in series.points:
            if point.spread is not None and _height_of(point, chart) == point.y.scaled:
                axes.errorbar(
                    point.x.scaled,
                    point.y.scaled,
                    yerr=point.spread.scaled,
                    color=color,
                    elinewidth=1,
                    capsize=2,
                    zorder=2,
                )
    bare(axes)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    _scales(axes, chart)
    log = " (log scale)" if chart.scale("y") == "log" else ""
    caption(axes, chart.y_label + log)
    axes.set_xlabel(chart.x_label + (" (log scale)" if chart.scale("x") != "linear" else ""), fontsize=8)
    if chart.reference is not None:
        label, number = chart.reference
        axes.axhline(number.scaled, color=MUTED, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
        spot = {"xytext": (0, 3), "textcoords": "offset points", "ha": "right", "xycoords": axes.get_yaxis_transform()}
        axes.annotate(f"{label} {number.text}", (1, number.scaled), color=MUTED, fontsize=7.5, **spot)
    if chart.kind == "scatter":
        _front(axes, chart)
        _label_points(canvas, axes, chart, others)
    elif len(chart.series) > 1:
        _label_ends(canvas, axes, chart, others)
        if chart.ceiling is not None:
            _label_beyond(canvas, axes, chart, others)


def _height_of(point: Point, chart: Chart) -> float:
    """Where a point is drawn: at its number, or at the chart's ceiling."""
    return point.y.scaled if chart.ceiling is None else min(point.y.scaled, chart.ceiling)


def _scales(axes: Axes, chart: Chart) -> None:
    from matplotlib.ticker import FuncFormatter

    for name in _AXES:
        axis, scale = (axes.xaxis if name == "x" else axes.yaxis), chart.scale(name)
        if scale == "log":
            (axes.set_xscale if name == "x" else axes.set_yscale)("log")
            points = [p for s in chart.series for p in s.points]
            decimal_ticks(axis, [p.x.scaled if name == "x" else _height_of(p, chart) for p in points])
        else:
            axis.set_major_formatter(FuncFormatter(lambda value, _: tick_text(value)))
    if chart.scale("x") == "log2":
        from matplotlib.ticker import NullLocator

        axes.set_xscale("log", base=2)
        ticks = sorted({p.x.scaled for series in chart.series for p in series.points})
        axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.08 if chart.kind == "scatter" else 0.03, y=0.09)
    if chart.kind == "lines" and chart.ceiling is not None:
        heights = [p.y.scaled for s in chart.series for p in s.points]
        heights += [] if chart.reference is None else [chart.reference[1].scaled]
        low = min(heights)
        is_log = chart.scale("y") == "log"
        below = low * (low / chart.ceiling) ** 0.07 if is_log else low - 0.07 * (chart.ceiling - low)
        axes.set_ylim(below, chart.ceiling)


def _label_ends(canvas: Any, axes: Axes, chart: Chart, others: list[str]) -> None:
    """Write each series' name to the right of its last point, pushed apart where they would overlap."""
    shown = [series for series in chart.series if series.points]
    lay_out(canvas)
    unit = canvas.dpi / 72
    axes_box = axes.get_window_extent()
    right = max((p.x.scaled for s in shown for p in s.points), default=0.0)
    ends = []
    for series in shown:
        point = series.points[-1]
        height = axes.transData.transform((right, _height_of(point, chart)))[1] - axes_box.y0
        ends.append((height / unit, series))
    heights = spread_apart([height for height, _ in ends], _LINE, axes_box.height / unit)
    for (_, series), height in zip(ends, heights, strict=True):
        axes.annotate(
            _with_number(series.label, series.points[-1], chart),
            (1, 0),
            xycoords="axes fraction",
            xytext=(5, height),
            textcoords="offset points",
            va="center",
            color=style_of(series.style, others)[0],
            fontsize=8,
            fontweight="bold" if series.style == registry.DEFAULT_METHOD else "normal",
        )


def _with_number(label: str, point: Point, chart: Chart) -> str:
    """Return a point's label, with its number where the point is drawn at the ceiling."""
    return f"{label} ↑ {point.y.text}".strip() if _height_of(point, chart) < point.y.scaled else label


def _label_beyond(canvas: Any, axes: Axes, chart: Chart, others: list[str]) -> None:
    """Write the numbers of lines' points that are drawn at the ceiling below them; the last one's is beside the line's name."""
    lay_out(canvas)
    unit, ceiling = canvas.dpi / 72, chart.ceiling
    assert ceiling is not None
    edge = axes.get_window_extent().x0 / unit
    taken: list[Box] = []
    found = [(p, s) for s in chart.series for p in s.points[:-1] if _height_of(p, chart) < p.y.scaled]
    for point, series in sorted(found, key=lambda pair: pair[0].x.scaled):
        label = _with_number("", point, chart)
        x = axes.transData.transform((point.x.scaled, ceiling))[0] / unit
        width, depth = 4.6 * len(label), 9.0
        left = max(x - width / 2, edge)
        while any(left < box[2] and box[0] < left + width and box[1] == depth for box in taken):
            depth += _LINE
        taken.append((left, depth, left + width, depth))
        axes.annotate(
            label,
            (point.x.scaled, ceiling),
            xytext=(left - x, -depth),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
            color=style_of(series.style, others)[0],
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.4},
            zorder=4,
        )


def _front(axes: Axes, chart: Chart) -> None:
    front = sorted((p.x.scaled, _height_of(p, chart)) for series in chart.series for p in series.points if p.marked)
    if len(front) > 1:
        axes.step(*zip(*front, strict=True), where="post", color=MUTED, linewidth=1, linestyle=(0, (4, 2)), zorder=1)
    for x, y in front:
        axes.plot([x], [y], marker="o", markersize=9.5, markerfacecolor="none", markeredgecolor=MUTED, zorder=2)


def _label_points(canvas: Any, axes: Axes, chart: Chart, others: list[str]) -> None:
    """Write each point's name where it covers no other point or name."""
    lay_out(canvas)
    unit = canvas.dpi / 72
    points = [(p, p.style or s.style) for s in chart.series for p in s.points]
    places = [tuple(axes.transData.transform((p.x.scaled, _height_of(p, chart))) / unit) for p, _ in points]
    box = axes.get_window_extent()
    bounds = (0.0, box.y0 / unit, box.x1 / unit + 6, box.y1 / unit + 8)
    taken: list[Box] = [(x - HALF_LINE, y - HALF_LINE, x + HALF_LINE, y + HALF_LINE) for x, y in places]
    leaders: list[Segment] = []
    for index, ((point, style), (x, y)) in enumerate(zip(points, places, strict=True)):
        label = _with_number(point.label, point, chart)
        own, others_at = taken[index], places[:index] + places[index + 1 :]
        spot = place_label((x, y), 4.9 * len(label), [box for box in taken if box != own], others_at, bounds, leaders)
        taken.append(spot)
        if needs_leader(spot, (x, y)):
            leaders.append(leader_of(spot, (x, y)))
        place = (point.x.scaled, _height_of(point, chart))
        leader = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
        axes.annotate(
            label,
            place,
            xytext=(spot[0] - x, (spot[1] + spot[3]) / 2 - y),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
            color=style_of(style, others)[0],
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.4},
            arrowprops=leader if needs_leader(spot, (x, y)) else None,
            zorder=4,
        )
