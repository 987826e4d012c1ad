"""Draw results of ``thanos bench layer --json``: time by width and by block size, peak memory, time of the factorisation.

    python benchmarks/plots.py FOLDER LAYER.json [LAYER.json ...]

The script writes ``time-width``, ``time-block``, ``peak`` and ``floor`` into FOLDER, as SVG and, with ``--png``, as PNG.
``floor`` is the fraction of the time that factorising H takes. A figure without lines is not written. The script needs the
extra ``report`` (matplotlib).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from thanos.recipe import LayerRecipe
from thanos.study.report.figures.theme import MUTED, OTHERS, STYLES
from thanos.system.extras import install_command

Result = dict[str, Any]
Lines = dict[str, list[tuple[float, float]]]

_REFERENCE: dict[bool, Any] = {True: ":", False: "-."}
"""Line style of a reference implementation: True for unstructured, False for n:m."""


def load(files: Iterable[Path]) -> tuple[list[Result], str]:
    """Return all results, and one line that says what they were measured on."""
    results, machines = [], []
    for file in files:
        report = json.loads(file.read_text(encoding="utf-8"))
        if report.get("benchmark") != "layer":
            raise SystemExit(f"{file} is no result of thanos bench layer; give a file that its option --json wrote")
        machine = report["machine"]
        results += report["results"]
        machines.append(
            f"{machine['device']}, {machine['threads']} thread(s), torch {machine['versions']['torch']}, "
            f"commit {machine['commit']}, {machine['date']}"
        )
    return results, "; ".join(dict.fromkeys(machines))


def label(result: Result) -> str:
    """Return the label of a line: method, pattern, and whether it is the reference implementation."""
    whose = "" if result["implementation"] == "thanos" else " (reference)"
    return f"{result['method']} {result['pattern']}{whose}"


def own_block(result: Result) -> int:
    """Return the default block size of the method."""
    return LayerRecipe(method=result["method"], pattern=result["pattern"]).resolved_block_size


def against_width(results: list[Result], value: Callable[[Result], float]) -> Lines:
    """Return a line for each solver over the widths, at its default block size; the median if there are several runs."""
    own = (result for result in results if result["block_size"] == own_block(result))
    return _gather((f"{label(r)}, B = {r['block_size']}", r["columns"], value(r)) for r in own)


def against_block(results: list[Result], value: Callable[[Result], float]) -> Lines:
    """Return a line for each solver over the block sizes, at the widest layer that was measured."""
    widest = max(result["columns"] for result in results)
    return _gather((label(r), r["block_size"], value(r)) for r in results if r["columns"] == widest)


def _gather(points: Iterable[tuple[str, float, float]]) -> Lines:
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, x, y in points:
        found[name][x].append(y)
    lines = {name: sorted((x, statistics.median(ys)) for x, ys in line.items()) for name, line in found.items()}
    return {name: line for name, line in lines.items() if len(line) > 1}


def draw(lines: Lines, title: str, x: str, y: str, about: str, *, linear: bool = False) -> Any:
    """Return a matplotlib figure of the lines. Both axes are logarithmic; y is linear if ``linear``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for (name, line), other in zip(sorted(lines.items()), OTHERS * len(lines), strict=False):
        colour, marker = STYLES.get(name.split()[0], other)
        dash = (
            ("-" if "unstructured" in name else "--") if "reference" not in name else _REFERENCE["unstructured" in name]
        )
        axes.plot(*zip(*line, strict=True), marker=marker, color=colour, linestyle=dash, label=name, markersize=4)
    ticks = sorted({point[0] for line in lines.values() for point in line})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yscale("linear" if linear else "log")
    if linear:
        axes.set_ylim(bottom=0)
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.grid(which="both" if not linear else "major", linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    below = {"loc": "upper left", "bbox_to_anchor": (0, -0.14)}  # clear of the grid
    axes.legend(**below, ncols=2, fontsize=8, frameon=False, handlelength=4)
    figure.supxlabel(about, fontsize=6, color=MUTED)
    return figure


def figures(results: list[Result], about: str) -> dict[str, Any]:
    """Return the figures by name, those without lines left out."""
    cpu = not any("NVIDIA" in word for word in about.split())
    memory = "peak of the process, GiB" if cpu else "peak beyond weight and Hessian, GiB"
    width = "width (columns)"
    widest = max(result["columns"] for result in results)

    def seconds(result: Result) -> float:
        return result["seconds"]

    def peak(result: Result) -> float:
        return result["peak_bytes"] / 2**30

    def share(result: Result) -> float:
        return 100 * result["floor_seconds"] / result["seconds"]

    wanted = {
        "time-width": (against_width(results, seconds), "Time against width", width, "seconds a layer", False),
        "time-block": (
            against_block(results, seconds),
            f"Time against block size, {widest} columns",
            "block size B",
            "seconds a layer",
            True,
        ),
        "peak": (against_width(results, peak), "Peak memory against width", width, memory, True),
        "floor": (
            against_width(results, share),
            "Share of the time that factorising H alone takes",
            width,
            "% of the time",
            True,
        ),
    }
    return {
        name: draw(lines, title, x, y, about, linear=linear)
        for name, (lines, title, x, y, linear) in wanted.items()
        if lines
    }


def main() -> int:
    """Draw the figures of the given files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--note", default="", help="added to the line below each figure")
    parser.add_argument("--png", action="store_true", help="write PNG too")
    given = parser.parse_args()
    try:
        import matplotlib
    except ImportError:
        raise SystemExit(f"figures need matplotlib; install it with: {install_command('report')}") from None
    results, about = load(given.files)
    given.folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "thanos", "svg.fonttype": "none", "font.size": 9}):
        for name, figure in figures(results, "; ".join(filter(None, (about, given.note)))).items():
            figure.savefig(given.folder / f"{name}.svg", metadata={"Date": None})  # the data alone decides the bytes
            if given.png:
                figure.savefig(given.folder / f"{name}.png", dpi=150)
    return 0


if __name__ == "__main__":
    sys.exit(main())
