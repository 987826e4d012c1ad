"""Fill the tables of a results page from the lines that repair.py wrote.

    python benchmarks/repair_page.py docs/results/repair.md [--check]

A table is between ``<!-- table FILE: NAME NAME … -->`` and ``<!-- end -->``. It has one row for each named line of FILE, a path
relative to the page. ``NAME*`` means all lines whose names begin with NAME, in the order of the file. Below the table are the
command, commit, hardware, versions and date of its lines. ``<!-- short FILE: NAME LABEL; NAME LABEL … -->`` makes a table with
only labels, perplexities, zero-shot accuracies and seconds. In this table ``NAME+NAME`` makes one row: the values of the last
of these lines, and the sum of the seconds of all. ``--check`` writes nothing, and fails if the page differs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

TABLE = re.compile(r"(<!-- (table|short) (\S+): ([^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)

Row = dict[str, Any]


def main() -> int:
    """Write the page, or compare it."""
    return fill_page(__doc__, filled)


def fill_page(description: str | None, fill: Callable[[str, Path], str]) -> int:
    """Run the command of a script that fills a page: write the page, or with ``--check`` return 1 if it differs.

    Args:
        description: what the script does, for ``--help``.
        fill: function of the page's text and folder that returns the filled text.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    before = arguments.page.read_text(encoding="utf-8")
    after = fill(before, arguments.page.parent)
    if arguments.check:
        return int(before != after)
    arguments.page.write_text(after, encoding="utf-8")
    return 0


def filled(page: str, folder: Path) -> str:
    """Return the page with its tables filled."""

    def table(match: re.Match[str]) -> str:
        head, kind, file, names, end = match.groups()
        rows = read(folder / file)
        made = short(rows, names) if kind == "short" else markdown(chosen(rows, names.split()))
        return f"{head}{made}{end}"

    return TABLE.sub(table, page)


def read(path: Path) -> list[Row]:
    """Return the lines of a results file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def chosen(rows: list[Row], names: list[str]) -> list[Row]:
    """Return the rows with these names, in the order of the names.

    Raises:
        KeyError: one of the names has no line.
    """
    found: list[Row] = []
    for name in names:
        of_name = [row for row in rows if fnmatchcase(row["name"], name) and row not in found]
        if not of_name:
            raise KeyError(f"no line is called {name}; there are {', '.join(row['name'] for row in rows)}")
        found += of_name
    return found


def markdown(rows: list[Row]) -> str:
    """Return the table of some rows and the lines below it. A column without any value is left out."""
    columns: dict[str, Callable[[Row], str]] = {
        "": lambda row: row["name"],
        "settings": lambda row: words(row.get("recipe", {})),
        "recovery": lambda row: words(row["recover"]) or "default" if "recover" in row else "",
        "perplexity": lambda row: f"{row['perplexity']:.2f}" if "perplexity" in row else "failed",
        "zero-shot, %": zero_shot,
        "seconds": lambda row: f"{row['seconds']:.0f}" if "seconds" in row else "",
        "of them training": lambda row: training(row),
        "peak device GiB": lambda row: (
            f"{row['peak_device_bytes'] / 2**30:.1f}" if row.get("peak_device_bytes") else ""
        ),
    }
    cells = {title: [column(row) for row in rows] for title, column in columns.items()}
    shown = {title: values for title, values in cells.items() if any(values)}
    lines = ["| " + " | ".join(shown) + " |", "|" + "---|" * len(shown)]
    lines += ["| " + " | ".join(values) + " |" for values in zip(*shown.values(), strict=True)]
    return "\n".join([*lines, "", *origins(rows), ""])


def short(rows: list[Row], names: str) -> str:
    """Return a table with labels.

    ``names`` has one entry for each row, separated by semicolons: names joined by plus signs, and a label.
    """
    lines = ["| | perplexity | zero-shot, % | seconds |", "|---|---|---|---|"]
    for name, _, label in (entry.strip().partition(" ") for entry in names.split(";")):
        steps = chosen(rows, name.split("+"))
        row, spent = steps[-1], sum(step.get("seconds", 0) for step in steps)
        seconds = f"{spent:.0f}" if spent else "–"
        lines.append(f"| {label} | {row['perplexity']:.2f} | {zero_shot(row) or '–'} | {seconds} |")
    return "\n".join(lines) + "\n"


def words(settings: dict[str, Any]) -> str:
    """Return settings as text, in one line: ``effort max, samples 128``."""
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)


def zero_shot(row: Row) -> str:
    """Return the average zero-shot accuracy with its standard error, in percent."""
    average = row.get("zero_shot", {}).get("average")
    return f"{100 * average['acc']:.1f} ± {100 * average['acc_stderr']:.1f}" if average else ""


def training(row: Row) -> str:
    """Return the seconds of the phases that train."""
    phases = row.get("phases", {})
    seconds = sum(phases.get(name, 0) for name in ("tune", "train"))
    return f"{seconds:.0f}" if seconds else ""


def origins(rows: list[Row]) -> list[str]:
    """Return the command, commit, hardware, versions and date of the lines, each combination once."""
    found: dict[str, None] = {}
    for row in rows:
        if "command" not in row:
            raise KeyError(f"the line {row['name']} does not name its command")
        versions = f"torch {row['torch']}, transformers {row['transformers']}"
        found[f"`{row['command']}` at {row['commit']}, {row['hardware']}, {versions}, {row['date']}"] = None
    return [f"<sub>{origin}</sub>" for origin in found]


if __name__ == "__main__":
    sys.exit(main())
