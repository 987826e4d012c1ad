"""Elements of all figures: axes without a frame, ticks, captions, markers and the legend."""

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
"""Fill styles of markers. Settings of a method, or models of a kind, have the first two with each marker, then the next two."""

_SIZES = {"D": 3.1}
"""Marker → size in points, for markers that look wider than others at the usual size."""

_LEGEND_WIDTH = 320.0
"""Largest width of a legend, in points: somewhat less than a figure's width."""

_LETTER, _HANDLE = 4.9, 34.0
"""Width of a letter in a legend, and of a handle with the space around it, in points."""


def other_methods(chart: Chart) -> list[str]:
    """Return the methods of a figure without a colour in the registry."""
    names = [series.style for series in chart.series] + [p.style for s in chart.series for p in s.points if p.style]
    return [name for name in dict.fromkeys(names) if own_style(name) is None]


def look_of(method: str, others: list[str], variant: int = 0) -> dict[str, Any]:
    """Return matplotlib's arguments for a method's marker. Each variant has its own fill style or marker."""
    color, markers = style_of(method, others)
    turn, place = divmod(variant, 2 * len(markers))
    marker = markers[place // 2]
    fill = {"fillstyle": _FILLS[(2 * turn + place % 2) % len(_FILLS)], "markerfacecoloralt": "none"}
    size = {"markersize": _SIZES.get(marker, 4.1), "markeredgewidth": 0.7}
    return {"color": color, "marker": marker, "linestyle": "none", **size, **fill}


def caption(axes: Axes, text: str, space: float = 0.0) -> None:
    """Write the label of y horizontally above its axis, ``space`` points higher than usual."""
    axes.set_title(text, loc="left", fontsize=8, color=MUTED, pad=8 + space)


def log_note(scale: str) -> str:
    """Return the part of an axis' label that names its scale."""
    return "" if scale == "linear" else " (log scale)"


def draw_reference(line: Callable[..., Any], reference: tuple[str, Number]) -> Any:
    """Draw the reference number with ``line`` (``axhline`` or ``axvline``), with a label for the legend."""
    label, number = reference
    style = {"color": MUTED, "linewidth": 0.9, "linestyle": (0, (2, 2)), "zorder": 1}
    return line(number.scaled, **style, label=f"{label} {number.text}")


def legend(canvas: Any, handles: Sequence[Any]) -> None:
    """Add a legend below the figure, and increase the figure's height by that of the legend. Without handles do nothing."""
    if not handles:
        return
    for handle in handles:
        handle.set_label(textwrap.fill(unbroken(handle.get_label()), int((_LEGEND_WIDTH - _HANDLE) / _LETTER)))
    texts = [handle.get_label().splitlines() for handle in handles]
    width = _HANDLE + _LETTER * max(len(line) for lines in texts for line in lines)
    across = max(1, min(len(handles), int(_LEGEND_WIDTH / width)))
    lines = [max(len(text) for text in texts[start : start + across]) for start in range(0, len(texts), across)]
    canvas.set_figheight(canvas.get_figheight() + 0.165 * sum(lines) + 0.05)
    style = {"frameon": False, "fontsize": 8, "handlelength": 2.6, "columnspacing": 1.2, "borderpad": 0.2}
    canvas.legend(handles=handles, loc="outside lower left", ncols=across, **style)


def unbroken(text: str) -> str:
    """Return a text whose numbers stay on one line with their unit or power: with no-break spaces around ``%`` and ``×``."""
    return text.replace(" %", "\u00a0%").replace(" × ", "\u00a0×\u00a0")


def bare(axes: Axes) -> None:
    """Remove the frame and the tick marks."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
    axes.set_axisbelow(True)


def decimal_ticks(axis: Any, values: list[float]) -> None:
    """Set the ticks of a logarithmic axis: 1, 2 and 5 of each decade, or fewer if there are many decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    span = max(values) / min(values)
    subs = (1.0, 2.0, 5.0) if span < 60 else (1.0, 3.0) if span < 2000 else (1.0,)
    axis.set_major_locator(LogLocator(base=10, subs=subs))
    axis.set_minor_locator(NullLocator())
    # With a tick for each of many decades, long numbers would overlap.
    longest = 1e6 if span < 1e5 else 1e4
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick_text(value, longest)))


def tick_text(value: float, longest: float = 1e6) -> str:
    """Return a tick's number as text: as a power of ten from ``longest`` up, else in full."""
    if value >= longest and math.isclose(10 ** round(math.log10(value)), value):
        return power_of_ten(round(math.log10(value)))
    return f"{value:,.6g}".replace("-", "−")
