"""``report.html``: one self-contained file, for wide screens and phones, with a light and a dark theme."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from thanos import registry
from thanos.study.report.figures.charts import Figure
from thanos.study.report.figures.theme import DARK, GRID, INK, MUTED, PAPER, STYLES, dark_rules
from thanos.study.report.numbers import Prose
from thanos.study.report.render import environment
from thanos.study.report.sections.common import FOOTNOTES, Section
from thanos.study.report.tables import Table, to_csv

_COLOURS = {"ink": INK, "muted": MUTED, "rule": GRID, "paper": PAPER, "accent": STYLES[registry.DEFAULT_METHOD][0]}


@dataclass(frozen=True, slots=True)
class Chapter:
    """The sections about one model; or, without a title, about all models."""

    title: str
    sections: Sequence[Section]


def render_page(title: str, lead: Prose, chapters: Sequence[Chapter], pictures: Mapping[str, str]) -> str:
    """Return the page.

    Args:
        title: heading of the page.
        lead: paragraph below the heading.
        chapters: chapters in reading order.
        pictures: figure name → SVG text.
    """
    several = sum(bool(chapter.title) for chapter in chapters) > 1

    def anchor(chapter: Chapter, section: Section) -> str:
        return f"{slug(chapter.title)}-{section.name}" if several and chapter.title else section.name

    filters = {
        "anchor": anchor,
        "css_text": _css_text,
        "csv_base64": _csv_base64,
        "inline": _inline,
        "own": _own_note,
        "repr": repr,
    }
    sections = [section for chapter in chapters for section in chapter.sections]
    figures = [figure for section in sections for figure in section.figures]
    notes = [part for section in sections for each in (*section.tables, *section.figures) for part in each.note]
    said = {part.strip() for part in notes if isinstance(part, str)}
    return (
        environment(**filters)
        .get_template("page.html")
        .render(
            title=title,
            lead=lead,
            chapters=chapters,
            several=several,
            pictures=pictures,
            data={figure.name: figure.to_dict() for figure in figures},
            light=_COLOURS,
            dark={name: DARK[colour] for name, colour in _COLOURS.items()},
            recolour=dark_rules(),
            footnotes=[each for each in FOOTNOTES if each in said],
        )
    )


def _own_note(note: Prose) -> Prose:
    """Return a note without the footnotes, which the page shows in a section of their own."""
    return tuple(part for part in note if not (isinstance(part, str) and part.strip() in FOOTNOTES))


def _css_text(words: str) -> str:
    """Return words as a string of CSS, for a heading that a narrow screen repeats in each row.

    A line may break after an underscore, as in the names of tasks.
    """
    words = words.replace("\\", "\\\\").replace('"', '\\"').replace("<", "\\3c ").replace("_", "_\\200b ")
    return f'"{words}"'


def _inline(svg: str, figure: Figure) -> str:
    """Return an SVG for inclusion in the page: without prologue and metadata, and with ids that are unique in the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{figure.name}-", svg)
    svg = re.sub(r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img" aria-label="@">', svg, count=1)
    return svg.replace("@", html.escape(figure.title), 1).strip()


def _csv_base64(table: Table) -> str:
    return base64.b64encode(to_csv(table).encode()).decode()


def slug(text: str) -> str:
    """Return a text converted for use in a file's name or an anchor."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "model"
