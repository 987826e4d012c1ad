"""What all figures share: axes without a frame, ticks, captions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from thanos.study.report.figures.charts import Chart
from thanos.study.report.figures.theme import MUTED, own_style
from thanos.study.report.numbers import power_of_ten

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def other_methods(chart: Chart) -> list[str]:
    """Return the methods of a figure that have no colour of their own."""
    names = [series.style for series in chart.series] + [p.style for s in chart.series for p in s.points if p.style]
    return [name for name in dict.fromkeys(names) if own_style(name) is None]


def caption(axes: Axes, text: str) -> None:
    """Write what y is above its axis, where it is read without turning the head."""
    axes.set_title(text, loc="left", fontsize=8, color=MUTED, pad=8)


def bare(axes: Axes) -> None:
    """Take away frame and tick marks."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
    axes.set_axisbelow(True)


def decimal_ticks(axis: Any, values: list[float]) -> None:
    """Set ticks of a logarithmic axis: 1, 2 and 5 of each decade, or fewer where there are many decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    span = max(values) / min(values)
    subs = (1.0, 2.0, 5.0) if span < 60 else (1.0, 3.0) if span < 2000 else (1.0,)
    axis.set_major_locator(LogLocator(base=10, subs=subs))
    axis.set_minor_locator(NullLocator())
    # Where there is a tick for each of many decades, long numbers would run into each other.
    longest = 1e6 if span < 1e5 else 1e4
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick_text(value, longest)))


def tick_text(value: float, longest: float = 1e6) -> str:
    """Return a tick's number: powers of ten from ``longest`` up, everything else in full."""
    if value >= longest and math.isclose(10 ** round(math.log10(value)), value):
        return power_of_ten(round(math.log10(value)))
    return f"{value:,.6g}".replace("-", "−")


def lay_out(canvas: Any) -> None:
    """Give every part of a figure its place, without drawing."""
    canvas.get_layout_engine().execute(canvas)
