"""Figures with a line or a square for each number: dot plots and heat maps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from thanos.study.report.figures.axes import bare, caption, decimal_ticks, other_methods, tick_text
from thanos.study.report.figures.charts import Chart, HeatMap, Point
from thanos.study.report.figures.theme import GRID, INK, MUTED, style_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_dots(axes: Axes, chart: Chart) -> None:
    """Draw a dot plot: a line for each point, grouped by series."""
    others, place = other_methods(chart), 0.0
    at_the_end = _near_the_end(chart)
    ticks: list[tuple[float, str, str, str]] = []
    axes.set_xscale("log" if chart.scale("y") == "log" else "linear")
    for series in chart.series:
        ticks.append((place, series.label, INK, "bold"))
        place += 1.0
        for point in series.points:
            color, marker = style_of(point.style or series.style, others)
            axes.plot([point.y.scaled], [place], marker=marker, color=color, markeredgecolor="none", zorder=3)
            if point.spread is not None:
                axes.errorbar(
                    point.y.scaled, place, xerr=point.spread.scaled, color=color, elinewidth=1, capsize=2, zorder=2
                )
            axes.annotate(
                point.y.text,
                (point.y.scaled, place),
                xytext=(-7 if at_the_end(point) else 7, 0),
                textcoords="offset points",
                ha="right" if at_the_end(point) else "left",
                va="center",
                fontsize=7.5,
            )
            ticks.append((place, point.label, color, "normal"))
            place += 1.0
        place += 0.1
    axes.set_yticks([tick[0] for tick in ticks], [tick[1] for tick in ticks])
    for label, (_, _, color, weight) in zip(axes.get_yticklabels(), ticks, strict=True):
        label.set_color(color)
        label.set_fontweight(weight)
    axes.set_ylim(place - 0.4, -0.7)
    bare(axes)
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    axes.margins(x=0.14)
    if chart.scale("y") == "log":
        decimal_ticks(axes.xaxis, [p.y.scaled for series in chart.series for p in series.points])
    if chart.reference is not None:
        label, number = chart.reference
        axes.axvline(number.scaled, color=MUTED, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
    reference = "" if chart.reference is None else f"   ┊ {chart.reference[0]} {chart.reference[1].text}"
    caption(axes, chart.y_label + (" (log scale)" if chart.scale("y") == "log" else "") + reference)


def _near_the_end(chart: Chart) -> Callable[[Point], bool]:
    """Return what tells whether a point lies so far to the right that its number belongs to its left."""
    place = math.log if chart.scale("y") == "log" else float
    places = [place(point.y.scaled) for series in chart.series for point in series.points]
    limit = min(places) + 0.85 * (max(places) - min(places))
    crowded = max(places) > min(places)
    return lambda point: crowded and place(point.y.scaled) > limit


def draw_heat_map(canvas: Any, axes: Axes, figure: HeatMap) -> None:
    """Draw blocks downwards and kinds of layers across, the scale above."""
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import FuncFormatter

    values = [[float("nan") if number is None else number.scaled for number in row] for row in figure.values]
    known = [value for row in values for value in row if value == value]
    log = figure.scale() == "log"
    # A share is drawn from 0 to 100 %, so that the same everywhere looks the same; an error from its least to its largest.
    low, high = (0.0, 100.0) if figure.label.endswith("(%)") else (min(known), max(known))
    high = high if high > low else low + 1e-9
    mesh = axes.pcolormesh(
        values, norm=(LogNorm if log else Normalize)(low, high), cmap="viridis", edgecolors="face", linewidth=0.2
    )
    axes.invert_yaxis()
    kinds = [index + 0.5 for index in range(len(figure.kinds))]
    axes.set_xticks(kinds, list(figure.kinds), rotation=35, ha="right", rotation_mode="anchor")
    step = 1 if len(figure.blocks) <= 12 else 5
    axes.set_yticks([index + 0.5 for index in range(0, len(figure.blocks), step)], list(figure.blocks[::step]))
    axes.set_ylabel("decoder block", fontsize=8)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0)
    bar = canvas.colorbar(mesh, ax=axes, location="top", fraction=0.022, pad=0.012, aspect=60)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2, width=0.6)
    bar.ax.set_title(figure.label + (" (log scale)" if log else ""), loc="left", fontsize=8, color=MUTED, pad=6)
    if log:
        decimal_ticks(bar.ax.xaxis, known)
    bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick_text(value)))
