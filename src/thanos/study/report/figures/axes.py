"""What all figures share: axes without a frame, ticks, captions, markers and the legend."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from thanos.study.report.figures.charts import Chart
from thanos.study.report.figures.theme import MUTED, own_style, style_of
from thanos.study.report.numbers import Number, power_of_ten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FILLS = ("full", "none", "bottom", "left", "top", "right")
"""How markers are filled that tell the settings of one method apart."""

_SIZES = {"D": 3.1}
"""Marker → its size in points, where the usual one would be wider than other markers are."""

_LEGEND_WIDTH = 320.0
"""Points: somewhat less than a figure's width."""

_LETTER, _HANDLE = 4.9, 34.0
"""Points: width of a legend's letter, and of a handle with the space around it."""


def other_methods(chart: Chart) -> list[str]:
    """Return the methods of a figure that have no colour of their own."""
    names = [series.style for series in chart.series] + [p.style for s in chart.series for p in s.points if p.style]
    return [name for name in dict.fromkeys(names) if own_style(name) is None]


def look_of(method: str, others: list[str], variant: int = 0) -> dict[str, Any]:
    """Return matplotlib's arguments for a method's marker; its filling tells the variants apart."""
    color, marker = style_of(method, others)
    fill = {"fillstyle": _FILLS[variant % len(_FILLS)], "markerfacecoloralt": "none"}
    size = {"markersize": _SIZES.get(marker, 4.1), "markeredgewidth": 0.7}
    return {"color": color, "marker": marker, "linestyle": "none", **size, **fill}


def caption(axes: Axes, text: str, space: float = 0.0) -> None:
    """Write what y is above its axis, where it is read without turning the head, and above ``space`` points left free."""
    axes.set_title(text, loc="left", fontsize=8, color=MUTED, pad=8 + space)


def log_note(scale: str) -> str:
    """Return what an axis' label says of its scale."""
    return "" if scale == "linear" else " (log scale)"


def draw_reference(line: Callable[..., Any], reference: tuple[str, Number]) -> Any:
    """Draw the number that the others are read against, by ``axhline`` or ``axvline``; it labels itself in the legend."""
    label, number = reference
    style = {"color": MUTED, "linewidth": 0.9, "linestyle": (0, (2, 2)), "zorder": 1}
    return line(number.scaled, **style, label=f"{label} {number.text}")


def legend(canvas: Any, handles: Sequence[Any]) -> None:
    """Put a legend below everything else, and make the figure higher by as much; nothing without handles."""
    if not handles:
        return
    for handle in handles:
        handle.set_label(textwrap.fill(handle.get_label(), int((_LEGEND_WIDTH - _HANDLE) / _LETTER)))
    texts = [handle.get_label().splitlines() for handle in handles]
    width = _HANDLE + _LETTER * max(len(line) for lines in texts for line in lines)
    across = max(1, min(len(handles), int(_LEGEND_WIDTH / width)))
    lines = [max(len(text) for text in texts[start : start + across]) for start in range(0, len(texts), across)]
    canvas.set_figheight(canvas.get_figheight() + 0.165 * sum(lines) + 0.05)
    style = {"frameon": False, "fontsize": 8, "handlelength": 2.6, "columnspacing": 1.2, "borderpad": 0.2}
    canvas.legend(handles=handles, loc="outside lower left", ncols=across, **style)


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
