"""Drawing figures as SVG and PNG with matplotlib. The same data gives the same bytes.

An SVG has the figure's data as JSON in its metadata (``dc:description``), and CSS rules for a dark background.
"""

from __future__ import annotations

import io
import json
import textwrap
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from thanos.errors import ResourceError
from thanos.study.report.figures.axes import unbroken
from thanos.study.report.figures.charts import Figure, HeatMap
from thanos.study.report.figures.panels import draw_dots, draw_heat_map
from thanos.study.report.figures.plane import draw_plane
from thanos.study.report.figures.theme import DARK, INK, MUTED, PAPER, dark_rules
from thanos.system.extras import install_command

if TYPE_CHECKING:
    from collections.abc import Iterator


_WIDTH = 4.6
"""Width of a figure in inches: on a phone's 360 pixels the 8.5-point text is then about as large as in print."""

_PNG_DPI = 200
_TITLE_LETTERS = 56
"""Number of letters of a title that fit on one line."""

_FONTS = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # part of matplotlib, so every machine draws the same
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.2,
    "svg.fonttype": "none",
    "axes.unicode_minus": True,
}


def draw(figure: Figure) -> tuple[str, bytes]:
    """Return a figure as SVG text with a background for each theme, and as PNG bytes with a white one."""
    with drawn(figure) as canvas:
        svg, png = io.StringIO(), io.BytesIO()
        data = json.dumps(figure.to_dict(), ensure_ascii=False, separators=(",", ":"))
        # No date and no version, so that the bytes depend only on the data.
        about = {"Date": None, "Creator": "thanos", "Title": figure.title, "Description": data}
        canvas.savefig(svg, format="svg", transparent=True, metadata=about)
        canvas.savefig(png, format="png", dpi=_PNG_DPI, facecolor=PAPER, metadata={"Software": None})
    head, rest = svg.getvalue().replace("'DejaVu Sans'", _FONTS).split("<metadata>", 1)
    # The background is opaque: a page may be light although the reader's system is dark, and shows the dark colours then.
    dark = f"svg{{background:{DARK[PAPER]}}}{dark_rules()}"
    style = f"<style>svg{{background:{PAPER}}}@media (prefers-color-scheme: dark){{{dark}}}</style>"
    return f"{head}{style}<metadata>{rest}", png.getvalue()


@contextmanager
def drawn(figure: Figure) -> Iterator[Any]:
    """Yield a figure as a matplotlib canvas with its final layout."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise ResourceError(f"figures need matplotlib; install it with: {install_command('report')}") from error
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": figure.name}):
        title = textwrap.fill(unbroken(figure.title), _TITLE_LETTERS)
        height = _height(figure) + 0.16 * (1 + title.count("\n"))
        canvas = Canvas(figsize=(_WIDTH, height), layout="constrained")
        FigureCanvasAgg(canvas)
        canvas.suptitle(title, x=0.005, ha="left", fontsize=8.8, fontweight="bold")
        axes = canvas.subplots()
        if isinstance(figure, HeatMap):
            draw_heat_map(canvas, axes, figure)
        elif figure.kind == "dots":
            draw_dots(canvas, axes, figure)
        else:
            draw_plane(canvas, axes, figure)
        engine = canvas.get_layout_engine()
        assert engine is not None
        engine.execute(canvas)
        canvas.set_layout_engine("none")  # the layout is final: saving must not change it
        yield canvas


def _height(figure: Figure) -> float:
    if isinstance(figure, HeatMap):
        return 1.5 + 0.135 * len(figure.blocks)
    if figure.kind == "dots":
        lines = sum(len(series.points) + 1.1 for series in figure.series)
        return 0.75 + 0.185 * lines
    return 3.1
