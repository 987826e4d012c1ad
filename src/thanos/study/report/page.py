"""``report.html``: one file that needs nothing else, on a wide screen, on a phone, light and dark."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

from thanos.study.report.figures.charts import Figure
from thanos.study.report.figures.theme import DARK, dark_rules
from thanos.study.report.numbers import Number, Prose
from thanos.study.report.sections.common import Section
from thanos.study.report.tables import Cell, Table, to_csv


@dataclass(frozen=True, slots=True)
class Chapter:
    """The sections about one model, or about all of them (no title)."""

    title: str
    sections: Sequence[Section]


def render_page(title: str, lead: Prose, chapters: Sequence[Chapter], pictures: Mapping[str, str]) -> str:
    """Return the page.

    Args:
        title: its heading.
        lead: what stands below the heading.
        chapters: in reading order.
        pictures: figure name → SVG text.
    """
    figures = [figure for chapter in chapters for section in chapter.sections for figure in section.figures]
    data = {figure.name: figure.to_dict() for figure in figures}
    several = sum(bool(chapter.title) for chapter in chapters) > 1
    body = "\n".join(_chapter(chapter, pictures, several=several) for chapter in chapters)
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            '<link rel="icon" href="data:,">',  # else a browser asks for /favicon.ico
            f"<title>{html.escape(title)}</title>",
            f"<style>{_style()}</style>",
            "</head>",
            "<body>",
            f"<header><h1>{html.escape(title)}</h1><p>{_prose(lead)}</p>{_contents(chapters, several=several)}</header>",
            f"<main>{body}</main>",
            "<footer><p>Every number carries its field and the keys of its cells (in the page's "
            "<code>data</code> elements); figures carry theirs as JSON. The same tables are in <code>tables/</code> as CSV, "
            "Markdown and LaTeX, the figures in <code>figures/</code> as SVG and PNG.</p></footer>",
            f'<script type="application/json" id="figures">{_json(data)}</script>',
            "</body>",
            "</html>",
            "",
        ]
    )


def _style() -> str:
    text = files("thanos.study.report").joinpath("page.css").read_text(encoding="utf-8")
    dark = "".join(f"--{name}:{DARK[light]};" for name, light in _VARIABLES.items())
    light = "".join(f"--{name}:{value};" for name, value in _VARIABLES.items())
    return f":root{{{light}}}{text}@media (prefers-color-scheme: dark){{:root{{{dark}}}{dark_rules('figure svg ')}}}"


_VARIABLES = {"ink": "#1f2328", "muted": "#5f6872", "rule": "#dfe3e8", "paper": "#ffffff", "accent": "#d1490c"}


def _anchor(chapter: Chapter, section: Section, *, several: bool) -> str:
    return f"{slug(chapter.title)}-{section.name}" if several and chapter.title else section.name


def _contents(chapters: Sequence[Chapter], *, several: bool) -> str:
    items = []
    for chapter in chapters:
        if several:
            items.append(f'<li class="model">{html.escape(chapter.title or "All models")}</li>')
        for section in chapter.sections:
            anchor = _anchor(chapter, section, several=several)
            items.append(f'<li><a href="#{anchor}">{html.escape(section.title)}</a></li>')
    return f'<nav aria-label="Contents"><ul>{"".join(items)}</ul></nav>'


def _chapter(chapter: Chapter, pictures: Mapping[str, str], *, several: bool) -> str:
    head = f'<h2 class="model">{html.escape(chapter.title)}</h2>' if several and chapter.title else ""
    sections = (_section(s, _anchor(chapter, s, several=several), pictures) for s in chapter.sections)
    return head + "\n".join(sections)


def _section(section: Section, anchor: str, pictures: Mapping[str, str]) -> str:
    paragraphs = "".join(f"<p>{_prose(prose)}</p>" for prose in section.prose)
    drawn = "".join(_figure(figure, pictures[figure.name]) for figure in section.figures)
    drawn = f'<div class="figures">{drawn}</div>' if drawn else ""
    tables = "".join(_table(table) for table in section.tables)
    parts = drawn + tables if section.name != "summary" else tables + drawn
    return (
        f'<section id="{anchor}"><h3>{html.escape(section.title)}</h3>{paragraphs}{parts}{_missing(section)}</section>'
    )


def _missing(section: Section) -> str:
    if not section.missing:
        return ""
    items = "".join(f"<li>{html.escape(text)}</li>" for text in section.missing)
    shown = section.tables or section.figures
    head = (
        "Not in the store; these cells would complete the section" if shown else "Not in the store; this section needs"
    )
    opened = "" if shown else " open"
    return f'<details class="missing"{opened}><summary>{head}</summary><ul>{items}</ul></details>'


def _figure(figure: Figure, svg: str) -> str:
    note = f" {_prose(figure.note)}" if figure.note else ""
    caption = f"<figcaption>{note}</figcaption>" if note else ""
    return f'<figure id="figure-{figure.name}">{_inline(figure, svg)}{caption}</figure>'


def _inline(figure: Figure, svg: str) -> str:
    """Return an SVG as part of the page: no prologue, no data of its own, names that no other figure has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{figure.name}-", svg)
    svg = re.sub(r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img" aria-label="@">', svg, count=1)
    return svg.replace("@", html.escape(figure.title), 1).strip()


def _table(table: Table) -> str:
    heads = "".join(
        f'<th scope="col"{_kind(column.is_text)}>{html.escape(column.head)}</th>' for column in table.columns
    )
    lines = []
    for index, row in enumerate(table.rows):
        if index in table.bands:
            band = html.escape(table.bands[index])
            lines.append(f'<tr class="band"><th colspan="{len(row)}" scope="rowgroup"><span>{band}</span></th></tr>')
        lines.append(f"<tr>{''.join(_cell(cell, c.is_text) for cell, c in zip(row, table.columns, strict=True))}</tr>")
    body = f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody>"
    title = html.escape(table.title)
    csv = base64.b64encode(to_csv(table).encode()).decode()
    link = f'<a download="{table.name}.csv" href="data:text/csv;base64,{csv}">CSV</a>'
    note = f'<p class="note">{_prose(table.note)} {link}</p>'
    inner = f'<table id="table-{table.name}">{body}</table>'
    box = f'<div class="box" role="region" aria-label="{title}" tabindex="0">{inner}</div>'
    if table.folded:
        return f'<details class="table"><summary>{title}</summary>{box}{note}</details>'
    return f'<div class="table"><p class="caption">{title}</p>{box}{note}</div>'


def _cell(cell: Cell, is_text: bool) -> str:
    if cell.prose:
        return f'<td class="text prose">{_prose(cell.prose)}</td>'
    if cell.number is None:
        return f"<td{_kind(is_text)}>{html.escape(cell.text)}</td>"
    shown = _number(cell.number)
    shown = f"<strong>{shown}</strong>" if cell.best else shown
    if cell.spread is not None:
        shown += f'<span class="spread"> ± {_number(cell.spread)}</span>'
    return f"<td>{shown}{html.escape(cell.mark)}</td>"


def _kind(is_text: bool) -> str:
    return ' class="text"' if is_text else ""


def _prose(prose: Prose) -> str:
    return "".join(html.escape(part) if isinstance(part, str) else _number(part) for part in prose)


def _number(number: Number) -> str:
    """Return a number with what it is and where it comes from, for machines."""
    minus = f' data-minus="{" ".join(number.minus)}"' if number.minus else ""
    return (
        f'<data value="{number.value!r}" data-field="{html.escape(number.field)}" data-how="{number.how}" '
        f'data-cells="{" ".join(number.cells)}"{minus}>{html.escape(number.text)}</data>'
    )


def _json(value: object) -> str:
    # "</" would end the script element wherever it stands.
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")


def slug(text: str) -> str:
    """Return a text as it may stand in a file's name or an anchor."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "model"


def all_tables(chapters: Iterable[Chapter]) -> list[Table]:
    """Return every table of a report."""
    return [table for chapter in chapters for section in chapter.sections for table in section.tables]


def all_figures(chapters: Iterable[Chapter]) -> list[Figure]:
    """Return every figure of a report."""
    return [figure for chapter in chapters for section in chapter.sections for figure in section.figures]
