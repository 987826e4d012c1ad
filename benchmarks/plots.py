"""Draw results of ``thanos bench layer --json``: time by width and by block size, peak memory, time of the factorisation.

    python benchmarks/plots.py FOLDER LAYER.json [LAYER.json ...]

The script writes ``time-width``, ``time-block``, ``peak`` and ``floor`` into FOLDER, as SVG and, with ``--png``, as PNG, in the
style of a study's report. ``floor`` is the fraction of the time that factorising H takes. A figure without lines is not
written. The script needs the extra ``report`` (matplotlib).
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

from thanos.errors import ResourceError
from thanos.recipe import LayerRecipe
from thanos.study.report.figures.charts import Chart, Point, Series
from thanos.study.report.figures.draw import draw
from thanos.study.report.numbers import Number
from thanos.study.report.results import title_of

Result = dict[str, Any]
Lines = dict[str, list[tuple[float, float]]]

FIGURES = ("time-width", "time-block", "peak", "floor")


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
    whose = "" if result["implementation"] == "thanos" else ", reference"
    return f"{title_of(result['method'])}, {result['pattern']}{whose}"


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


def chart(name: str, results: list[Result], about: str, note: str = "") -> Chart:
    """Return one of the figures ``time-width``, ``time-block``, ``peak`` and ``floor``.

    Args:
        name: name of the figure.
        results: all results.
        about: what they were measured on. It is the origin of each number in the SVG's data.
        note: added to the title.
    """
    cpu = not any("NVIDIA" in word for word in about.split())
    memory = "peak of the process (GiB)" if cpu else "peak beyond weight and Hessian (GiB)"
    title, y_label, field, value = {
        "time-width": ("Time against width", "seconds per layer", "seconds", _seconds),
        "time-block": (
            f"Time against block size, {max(r['columns'] for r in results)} columns",
            "seconds per layer",
            "seconds",
            _seconds,
        ),
        "peak": ("Peak memory against width", memory, "peak_bytes", _peak),
        "floor": ("Share of time for factorising H", "% of the time", "floor_share", _share),
    }[name]
    over_blocks = name == "time-block"
    lines = (against_block if over_blocks else against_width)(results, value)
    x_field, x_label = ("block_size", "block size B") if over_blocks else ("layer_width", "columns of the layer")
    series = []
    for (text, line), result in zip(lines.items(), _one_of_each(lines, results), strict=True):
        points = tuple(
            Point(Number(x, x_field, "value", (about,)), Number(y, field, "value", (about,))) for x, y in line
        )
        series.append(Series(text, result["method"], points, _variant(result)))
    return Chart("lines", name, ", ".join(filter(None, (title, note))), x_label, y_label, tuple(series), x_scale="log2")


def _one_of_each(lines: Lines, results: list[Result]) -> list[Result]:
    """Return a result of each line."""
    return [next(result for result in results if text.split(", B = ")[0] == label(result)) for text in lines]


def _variant(result: Result) -> int:
    """Return the number of a line's dashes: those of ours and of the reference, unstructured and with n:m."""
    return (result["implementation"] != "thanos") * 2 + (result["pattern"] != "unstructured")


def _seconds(result: Result) -> float:
    return result["seconds"]


def _peak(result: Result) -> float:
    return result["peak_bytes"]


def _share(result: Result) -> float:
    return result["floor_seconds"] / result["seconds"]


def main() -> int:
    """Draw the figures of the given files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--note", default="", help="added to the title of each figure")
    parser.add_argument("--png", action="store_true", help="write PNG too")
    given = parser.parse_args()
    results, about = load(given.files)
    given.folder.mkdir(parents=True, exist_ok=True)
    for name in FIGURES:
        figure = chart(name, results, about, given.note)
        if not figure.series:
            continue
        try:
            svg, png = draw(figure)
        except ResourceError as error:
            raise SystemExit(str(error)) from None
        (given.folder / f"{name}.svg").write_text(svg, encoding="utf-8")
        if given.png:
            (given.folder / f"{name}.png").write_bytes(png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
