"""The results block of a README, generated from a store between two markers. A test detects a stale block.

<!-- results: docs/results/MODEL -->
…headline table, figure, device and date…
<!-- end of results -->
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from thanos.errors import DataError
from thanos.study.report.build import Report, build_report
from thanos.study.report.numbers import short
from thanos.study.report.tables import Table, to_markdown
from thanos.study.store import Contents, read_store, store_path

_COLUMNS = ("method", "rank", "sparsity", "perplexity", "kl_divergence", "zero_shot", "seconds")
_BLOCK = re.compile(r"(<!-- results: (?P<folder>\S+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def result_folders(text: str) -> list[str]:
    """Return the folders that a README's markers name."""
    return [match["folder"] for match in _BLOCK.finditer(text)]


def with_results(text: str, root: Path) -> str:
    """Return a README's text with every results block generated again from its store.

    Args:
        text: text of the README.
        root: folder to which the markers' paths are relative.

    Raises:
        DataError: a store cannot be read.
    """

    def block(match: re.Match[str]) -> str:
        path = store_path(root / match["folder"])
        contents = read_store(path)
        return f"{match[1]}\n{_results(build_report(contents), contents, match['folder'], path.name)}\n{match[3]}"

    return _BLOCK.sub(block, text)


def update_readme(readme: Path, folder: Path) -> None:
    """Write the results of a study's folder into a README.

    Raises:
        DataError: the README cannot be read, or has no marker for the folder.
    """
    try:
        text = readme.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--readme {readme} cannot be read: {error}") from error
    root = readme.resolve().parent
    named = [(root / name).resolve() for name in result_folders(text)]
    if folder.resolve() not in named:
        shown = folder.resolve()
        shown = shown.relative_to(root) if shown.is_relative_to(root) else shown
        raise DataError(
            f"--readme {readme} has no markers for these results; add the lines <!-- results: {shown} --> and "
            "<!-- end of results --> where the results should be"
        )
    readme.write_text(with_results(text, root), encoding="utf-8")


def _results(report: Report, contents: Contents, folder: str, store: str) -> str:
    tables = [table for table in report.tables if table.name.split("_")[0] == "summary"]
    figures = [figure for figure in report.figures if figure.name.split("_")[0] == "summary"]
    parts = [to_markdown(_narrow(table)) for table in tables]
    parts += [f"![{figure.title}]({folder}/figures/{figure.name}.svg)\n" for figure in figures]
    numbers = [cell.number for table in tables for row in table.rows for cell in row if cell.number is not None]
    shown = {key for number in numbers for key in number.cells}
    records = [record for record in contents.done if short(record) in shown]
    devices = ", ".join(dict.fromkeys(record.machine["device"] for record in records))
    dates = sorted(record.date[:10] for record in records)
    span = f", {' to '.join(dict.fromkeys((dates[0], dates[-1])))}" if dates else ""
    parts.append(f"{devices}{span}; made by `thanos report` from `{folder}/{store}`.\n")
    return "\n".join(parts)


def _narrow(table: Table) -> Table:
    """Return the table with only the columns that fit in a README."""
    kept = [index for index, column in enumerate(table.columns) if column.name in _COLUMNS]
    rows = tuple(tuple(row[index] for index in kept) for row in table.rows)
    return dataclasses.replace(table, columns=tuple(table.columns[index] for index in kept), rows=rows)
