"""Dot plots, with one line for each number, and heat maps, with one square for each number."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
from thanos.study.report.figures.charts import Chart, HeatMap
from thanos.study.report.figures.theme import GRID, INK, MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_dots(canvas: Any, axes: Axes, chart: Chart) -> None:
    """Draw a dot plot: a line for each point, grouped by series, with the label to the left and the number to the right."""
    others, height, log = other_methods(chart), 0.0, chart.scale("y") == "log"
    ticks: list[tuple[float, str, str, str]] = []
    numbers: list[tuple[float, str]] = []
    axes.set_xscale("log" if log else "linear")
    for series in chart.series:
        ticks.append((height, series.label, INK, "bold"))
        for point in series.points:
            height += 1.0
            look, spread = look_of(point.style or series.style, others), point.spread
            axes.plot([point.y.scaled], [height], **look, zorder=3)
            if spread is not None:
                bar = {"color": look["color"], "elinewidth": 1, "capsize": 2, "zorder": 2}
                axes.errorbar(point.y.scaled, height, xerr=spread.scaled, **bar)
            numbers.append((height, point.y.text))
            ticks.append((height, point.label, look["color"], "normal"))
        height += 1.1
    axes.set_yticks([tick[0] for tick in ticks], [tick[1] for tick in ticks])
    for label, (_, _, color, weight) in zip(axes.get_yticklabels(), ticks, strict=True):
        label.set_color(color)
        label.set_fontweight(weight)
    axes.set_ylim(height - 0.4, -0.7)
    right = axes.secondary_yaxis("right")
    right.set_yticks(*zip(*numbers, strict=True))
    right.tick_params(length=0, labelcolor=INK)
    right.spines["right"].set_visible(False)
    bare(axes)
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    if log:
        decimal_ticks(axes.xaxis, [p.y.scaled for series in chart.series for p in series.points])
    caption(axes, chart.y_label + log_note(chart.scale("y")))
    legend(canvas, [] if chart.reference is None else [draw_reference(axes.axvline, chart.reference)])


def draw_heat_map(canvas: Any, axes: Axes, figure: HeatMap) -> None:
    """Draw a heat map: blocks downwards, kinds of layers across, and the colour scale above."""
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import FuncFormatter

    values = [[float("nan") if number is None else number.scaled for number in row] for row in figure.values]
    known = [value for row in values for value in row if value == value]
    log = figure.scale() == "log"
    # The colours of percentages span 0 to 100 %, so that maps are comparable; those of errors span the map's own range.
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
    bar.ax.set_title(figure.label + log_note(figure.scale()), loc="left", fontsize=8, color=MUTED, pad=6)
    if log:
        decimal_ticks(bar.ax.xaxis, known)
    bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick_text(value)))
