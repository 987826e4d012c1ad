"""Compute scaling exponents from results of ``thanos bench layer --json`` over several widths and block sizes.

    python benchmarks/exponents.py LAYER.json

The script prints a Markdown table with three slopes of log seconds against log columns (least squares) for each solver and
block size: the measured one, the cost model's (docs/cost.md) in brackets, and the measured one over the three largest widths.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

WIDEST = 3
"""Number of widths for the last slope. At large widths arithmetic takes the largest part of the time."""


def slope(points: list[tuple[float, float]]) -> float:
    """Return the least-squares slope of log y against log x."""
    x, y = ([math.log(point[i]) for point in points] for i in range(2))
    middle, level = sum(x) / len(x), sum(y) / len(y)
    return sum((a - middle) * (b - level) for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)


def table(results: list[dict[str, Any]]) -> str:
    """Return the slopes of this package's solvers: one row per solver, one column per block size."""
    by_solver: dict[str, dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        if result["implementation"] == "thanos":
            by_solver[f"{result['method']}, {result['pattern']}"][result["block_size"]].append(result)
    sizes = sorted({size for by_size in by_solver.values() for size in by_size})
    lines = [
        "| exponent of b: all widths (by the formulas), three largest widths | "
        + " | ".join(f"B = {size}" for size in sizes)
        + " |"
    ]
    lines.append("|---" * (len(sizes) + 1) + "|")
    for name, by_size in by_solver.items():
        cells = []
        for size in sizes:
            own = sorted(by_size.get(size, []), key=lambda result: result["columns"])
            if len({result["columns"] for result in own}) < 2:
                cells.append("–")
                continue
            measured, modelled = (
                [(result["columns"], result[key]) for result in own] for key in ("seconds", "modelled_seconds")
            )
            cells.append(f"{slope(measured):.2f} ({slope(modelled):.2f}), {slope(measured[-WIDEST:]):.2f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table of one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    report = json.loads(parser.parse_args().file.read_text(encoding="utf-8"))
    if report.get("benchmark") != "layer":
        raise SystemExit("give a file that thanos bench layer --json wrote")
    sys.stdout.write(table(report["results"]) + "\n")


if __name__ == "__main__":
    main()
