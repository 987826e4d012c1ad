"""Draw the perplexity of pruned models after each step of their repair, from the lines that repair.py wrote.

    python benchmarks/repair_figure.py docs/results/repair

The script reads ``smollm2-135m-h200.jsonl`` in that folder and writes ``steps.svg`` there. The same lines give the same bytes.
It needs the extra ``report`` (matplotlib).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from repair_page import Row, chosen, read

from thanos.study.report.figures.charts import Chart, Point, Series
from thanos.study.report.figures.draw import draw
from thanos.study.report.numbers import Number

LINES = "smollm2-135m-h200.jsonl"
FIGURE = "steps.svg"

GROUPS = {
    ("half of the weights", "sparse"): {"50": "max", "50-recovered-0": "recover"},
    ("16:32", "packed"): {"fast-16of32": "fast", "16of32": "max", "16of32-recovered-0": "recover"},
    ("2:4", "packed"): {"2of4": "max", "2of4-recovered-0": "recover"},
    ("a fifth of the neurons", "shrunk"): {"neurons20": "max", "neurons20-recovered-0": "recover"},
}
"""Title and style of a group → name of each of its lines → label of the point."""


def main() -> int:
    """Write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    svg, _ = draw(chart(read(folder / LINES)))
    (folder / FIGURE).write_text(svg, encoding="utf-8")
    return 0


def chart(rows: list[Row]) -> Chart:
    """Return the figure of some lines.

    Raises:
        KeyError: a name in :data:`GROUPS` has no line.
    """
    series = [
        Series(title, style, tuple(_point(rows, name, label) for name, label in names.items()))
        for (title, style), names in GROUPS.items()
    ]
    (dense,) = chosen(rows, ["dense"])
    reference = ("dense", _number(dense, "perplexity"))
    return Chart(
        "dots", "steps", "Perplexity after each step, and its seconds", "", "perplexity", tuple(series), reference
    )


def _point(rows: list[Row], name: str, label: str) -> Point:
    (row,) = chosen(rows, [name])
    seconds = _number(row, "seconds")
    return Point(seconds, _number(row, "perplexity"), label=f"{label}, {row['seconds']:.0f} s")


def _number(row: Row, field: str) -> Number:
    return Number(row[field], field, "value", (row["name"],))


if __name__ == "__main__":
    sys.exit(main())
