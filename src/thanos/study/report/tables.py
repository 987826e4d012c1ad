"""Tables of a report, and their output as CSV, Markdown and LaTeX. HTML is in page.py."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from thanos.study.report.numbers import Number, Prose, plain
from thanos.study.report.render import environment

_WITHOUT_SPREAD = ("zero_shot_stderr", "layer_error", "solve_seconds", "sparsity", "peak_bytes")
"""Fields that tables show without spread, to stay narrow. The table of noise has the spread of the layer error."""


UNKNOWN = "–"
"""Shown for a number that is not in the store. In a CSV file the entry is empty."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a table: a number with or without its spread, or a text.

    Attributes:
        text: text that is shown if there is no number.
        number: number from the store.
        spread: spread of the number over seeds.
        best: whether the number is shown bold.
        mark: mark after the number: ``=`` a tie, ``°`` one seed. Not in CSV files.
        prose: a sentence with several numbers, instead of the other attributes.
    """

    text: str = ""
    number: Number | None = None
    spread: Number | None = None
    best: bool = False
    mark: str = ""
    prose: Prose = ()

    @property
    def shown(self) -> str:
        """The cell as displayed text."""
        if self.prose:
            return plain(self.prose)
        if self.number is None:
            return self.text
        spread = "" if self.spread is None else f" ± {self.spread.text}"
        return f"{self.number.text}{spread}{self.mark}"


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its displayed heading, and its name in the CSV file. Numbers are aligned right."""

    head: str
    name: str
    is_text: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A table.

    Attributes:
        name: name of its files, without ending.
        title: title above the table.
        columns: columns from left to right.
        rows: rows, each with one cell for each column.
        bands: row index → the heading above that row.
        note: text below the table: number of cells, sparsity, explanation of the marks.
        folded: whether the table is closed in the page until the reader opens it.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    bands: dict[int, str] = field(default_factory=dict)
    note: Prose = ()
    folded: bool = False


def text(value: str) -> Cell:
    """Return a cell of text."""
    return Cell(text=value)


def number(value: Number | None, spread: Number | None = None, *, best: bool = False, mark: str = "") -> Cell:
    """Return a cell of a number; a dash if it is unknown."""
    return Cell(text=UNKNOWN, number=value, spread=spread, best=best, mark=mark)


HEADS = {
    "alpha": "α",
    "block_size": "B",
    "sparsity": "sparsity (%)",
    "sparsity_all": "of all parameters (%)",
    "kl_divergence": "KL (nats/token)",
    "top1_agreement": "top-1 (%)",
    "zero_shot": "zero-shot (%)",
    "zero_shot_stderr": "standard error (%)",
    "layer_error": "layer error",
    "seconds": "pruning (s)",
    "solve_seconds": "solving (s)",
    "peak_bytes": "additional peak memory (GiB)",
}
"""Name of a column → its heading in every table."""


def columns(*heads: str) -> tuple[Column, ...]:
    """Return columns from names that are separated by ``;``.

    ``heading|name`` gives a heading that is not in :data:`HEADS`. A leading ``<`` makes a column of text.
    """
    parsed = []
    for head in (each.strip() for texts in heads for each in texts.split(";")):
        shown, _, name = head.removeprefix("<").partition("|")
        name = name or (shown if shown in HEADS else shown.lower().replace(" ", "_"))
        parsed.append(Column(HEADS.get(shown, shown), name, head.startswith("<")))
    return tuple(parsed)


Line = Sequence[Cell | Number | str | None]
"""A row of a table: a string becomes a cell of text, a number a cell of that number, None a cell of an unknown number."""


def table(
    name: str,
    title: str,
    heads: str | Sequence[Column],
    lines: Sequence[Line] | dict[str, list[Line]],
    note: Prose = (),
    *,
    folded: bool = False,
) -> Table:
    """Return a table.

    ``heads`` are columns, or names as :func:`columns` takes them. ``lines`` are rows, or a dict from a heading to the rows
    below it. A heading without rows is left out.
    """
    rows: list[tuple[Cell, ...]] = []
    bands: dict[int, str] = {}
    groups: Iterable[tuple[str, Sequence[Line]]] = lines.items() if isinstance(lines, dict) else [("", lines)]
    for band, own in groups:
        cells = [tuple(_cell(value) for value in line) for line in own]
        if band and cells:
            bands[len(rows)] = band
        rows += cells
    return Table(
        name, title, columns(heads) if isinstance(heads, str) else tuple(heads), tuple(rows), bands, note, folded
    )


def _cell(value: Cell | Number | str | None) -> Cell:
    return value if isinstance(value, Cell) else Cell(text=value) if isinstance(value, str) else number(value)


def to_csv(table: Table) -> str:
    """Return a table as CSV: unrounded numbers in the store's units, spreads in separate columns, unknown entries empty."""
    spreads = {index for row in table.rows for index, cell in enumerate(row) if cell.spread is not None}
    heads = ["group"] if table.bands else []
    for index, column in enumerate(table.columns):
        heads += [column.name, *([f"{column.name}_spread"] if index in spreads else [])]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(heads)
    band = ""
    for index, row in enumerate(table.rows):
        band = table.bands.get(index, band)
        line = [band] if table.bands else []
        for position, cell in enumerate(row):
            unknown = cell.number is None and cell.text == UNKNOWN and not table.columns[position].is_text
            line.append("" if unknown else cell.shown if cell.number is None else repr(cell.number.value))
            if position in spreads:
                line.append("" if cell.spread is None else repr(cell.spread.value))
        writer.writerow(line)
    return out.getvalue()


def to_markdown(table: Table) -> str:
    """Return a table in GitHub's Markdown, title above and note below."""
    return _render("table.md", table)


def to_latex(table: Table) -> str:
    """Return a table for LaTeX, with the package booktabs."""
    return _render("table.tex", table)


def _render(template: str, table: Table) -> str:
    values = {field.name: getattr(table, field.name) for field in fields(table)}
    return environment(markdown=_markdown, latex=_latex, plain=plain).get_template(template).render(values)


def _markdown(value: str) -> str:
    return value.replace("|", r"\|").replace("\n", " ")


_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "α": r"$\alpha$",
    "±": r"$\pm$",
    "−": r"$-$",
    "×": r"$\times$",
    "≤": r"$\le$",
    "°": r"$^\circ$",
    "–": "--",
    "·": r"$\cdot$",
    "Δ": r"$\Delta$",
    "ᵀ": r"$^{T}$",
    "“": "``",
    "”": "''",
    "…": r"\dots{}",
    "<": r"$<$",
    ">": r"$>$",
}


_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"
_AT_THE_LINE = str.maketrans(_SUPERSCRIPTS, "0123456789-")


def _latex(value: str) -> str:
    parts = re.split(rf"([{_SUPERSCRIPTS}]+)", value)
    return "".join(
        f"$^{{{part.translate(_AT_THE_LINE)}}}$"
        if index % 2
        else "".join(_LATEX.get(letter, letter) for letter in part)
        for index, part in enumerate(parts)
    )


WRITERS = {"csv": to_csv, "md": to_markdown, "tex": to_latex}
"""File ending → writer."""


def measures(row: Any, fields: Sequence[str], best: dict[str, Any] | None = None) -> list[Cell]:
    """Return a cell for each field of a row: mean and spread, bold if ``best`` contains this row for the field.

    ``°`` marks a field that only one seed has, in a row with several. Some seeds may have no tasks, or no seconds since they
    shared their device.
    """
    cells = []
    for name in fields:
        spread = row.spread(name)
        lone = len(row.draws) > 1 and spread is None and row.mean(name) is not None and name != "zero_shot_stderr"
        shown = None if name in _WITHOUT_SPREAD else spread
        cell = number(row.mean(name), shown, best=bool(best) and row in best.get(name, ()), mark="°" if lone else "")
        cells.append(cell)
    return cells
