"""Building a report from a store, and writing its files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from thanos.errors import DataError, ResourceError
from thanos.events import Event
from thanos.study.report.comparable import is_cost_only
from thanos.study.report.figures.charts import Figure
from thanos.study.report.figures.draw import draw
from thanos.study.report.numbers import Number, Prose, count
from thanos.study.report.page import Chapter, render_page, slug
from thanos.study.report.results import Results, models_of
from thanos.study.report.sections import COST_SECTIONS, MODEL_SECTIONS, data
from thanos.study.report.sections.common import HEADLINE, Section
from thanos.study.report.sections.conclusion import NOISE, conclusion
from thanos.study.report.sections.paper import perplexity_table
from thanos.study.report.sections.summary import METHODS
from thanos.study.report.tables import WRITERS, Table
from thanos.study.store import Contents, read_store, store_path
from thanos.system.event_stream import EventStream
from thanos.system.files import write_atomically

PAGE = "report.html"

_SHOWN = ("sparsity_", "cost_")
_FOLDED = "_memory"
"""Figures whose names begin with one of ``_SHOWN`` follow the main table, unless they end with ``_FOLDED``."""


@dataclass(frozen=True, slots=True)
class Report:
    """A whole report as data, before it is written to files."""

    title: str
    lead: Prose
    chapters: tuple[Chapter, ...]

    @property
    def tables(self) -> list[Table]:
        """Every table, in reading order."""
        return [table for chapter in self.chapters for section in chapter.sections for table in section.tables]

    @property
    def figures(self) -> list[Figure]:
        """Every figure, in reading order."""
        return [figure for chapter in self.chapters for section in chapter.sections for figure in section.figures]

    def table(self, name: str) -> Table | None:
        """Return a table by name; None if the store has no cells for it."""
        return next((table for table in self.tables if table.name == name), None)


def build_report(contents: Contents) -> Report:
    """Return the report of a store's contents: the conclusion, the table and the figures of each model, and folded sections.

    A section without a table and a figure is left out, since the store has no cells for it, and so is a model without sections.
    """
    models = models_of(contents.records)
    studies = [Results(model, contents.done) for model in models]
    chapters = []
    for results in studies:
        sections = [section(results) for section in (COST_SECTIONS if results.cost_only else MODEL_SECTIONS)]
        ending = "" if len(models) == 1 else f"_{slug(results.model)}"
        shown = _ordered([section for section in sections if not section.empty])
        chapters.append(Chapter(results.model, [_renamed(section, ending) for section in shown]))
    evaluated = [results for results in studies if not results.cost_only]
    shared = [perplexity_table(evaluated)] if len(evaluated) > 1 else []
    shared = [section for section in shared if not section.empty]
    for section in (*shared, rest := data(contents.done, contents.failed, studies)):
        section.folded = True
    rest.missing = [
        f"{section.title}: {line}"
        for results, chapter in zip(studies, chapters, strict=True)
        for section in (chapter.sections if _repeats_the_paper(results) else ())
        for line in section.missing
    ]
    chapters = [chapter for chapter in chapters if chapter.sections]  # of some models every cell failed
    chapters.append(Chapter("", [*shared, rest]))
    title = f"Pruning {', '.join(models)}" if models else "An empty study"
    return Report(title, _lead(contents, evaluated or studies), tuple(chapters))


def _repeats_the_paper(results: Results) -> bool:
    """Whether a study has most of the paper's methods and patterns, so that its missing cells are of interest."""
    methods, patterns = {row.method for row in results.rows}, {row.pattern for row in results.rows}
    return len(methods & set(METHODS)) > len(METHODS) // 2 and len(patterns & set(HEADLINE)) > len(HEADLINE) // 2


def _lead(contents: Contents, studies: list[Results]) -> Prose:
    """Return the conclusion about each model, a definition of the noise if they name it, and the number of failed cells."""
    parts: list[str | Number] = []
    for results in studies:
        found = conclusion(results)
        if found:
            parts += [*([" "] if parts else []), *([f"{results.model}: "] if len(studies) > 1 else []), *found]
    if any("the noise" in part for part in parts if isinstance(part, str)):
        parts.append(f" {NOISE}")
    if not parts:
        done = [record for record in contents.done if is_cost_only(record)]
        noun = "cell" if len(done) == 1 else "cells"
        parts = ["No pruned model has a result to compare."]
        if done:
            parts = ["A study of ", count(done), f" {noun} without a perplexity. It shows the cost of pruning."]
    if contents.failed:
        failed = len(contents.failed)
        parts += [
            " ",
            count(contents.failed),
            f" {'cell' if failed == 1 else 'cells'} failed; the reasons are at the end.",
        ]
    return tuple(parts)


def _ordered(sections: list[Section]) -> list[Section]:
    """Move the figures of accuracy into the first section, below its table, and fold the other sections."""
    first, *others = sections or [Section("summary", "Summary")]
    for start in _SHOWN:
        for section in others:
            section.folded = True
            moved = [f for f in section.figures if f.name.startswith(start) and not f.name.endswith(_FOLDED)]
            first.figures += moved
            section.figures = [figure for figure in section.figures if figure not in moved]
    return [section for section in (first, *others) if not section.empty]


def write_report(folder: str | Path, on_event: Callable[[Event], None] | None = None) -> Report:
    """Write ``report.html``, ``tables/`` and ``figures/`` into a study's folder. The same store gives the same bytes.

    Args:
        folder: the study's folder, which contains ``store.jsonl``.
        on_event: called with each progress event.

    Raises:
        DataError: there is no store, or it has no record.
        ResourceError: matplotlib is not installed, or a file cannot be written.
    """
    path = store_path(folder)
    contents = read_store(path)
    if not contents.records:
        raise DataError(f"{path} has no record; run the study first: thanos study STUDY.toml {path.parent}")
    report = build_report(contents)
    try:
        return write_files(report, path.parent, EventStream(on_event))
    except OSError as error:
        raise ResourceError(f"{error.filename or path.parent} cannot be written: {error.strerror}") from error


def write_files(report: Report, out: Path, emit: Callable[[Event], None], *, page: str = PAGE) -> Report:
    """Write a report's page, ``tables/`` and ``figures/`` into a folder, and remove those of an earlier one.

    Args:
        report: the report.
        out: the folder.
        emit: called with each progress event.
        page: name of the page's file.

    Raises:
        OSError: a file cannot be written.
        ResourceError: matplotlib is not installed.
    """
    pictures: dict[str, str] = {}
    figures = _emptied(out / "figures", {f"{f.name}.{ending}" for f in report.figures for ending in ("svg", "png")})
    for done, figure in enumerate(report.figures, 1):
        pictures[figure.name], png = draw(figure)
        write_atomically(figures / f"{figure.name}.svg", pictures[figure.name].encode())
        write_atomically(figures / f"{figure.name}.png", png)
        emit(Event(kind="progress", phase="draw", done=done, total=len(report.figures)))
    tables = _emptied(out / "tables", {f"{t.name}.{ending}" for t in report.tables for ending in WRITERS})
    for table in report.tables:
        for ending, writer in WRITERS.items():
            write_atomically(tables / f"{table.name}.{ending}", writer(table).encode())
    write_atomically(out / page, render_page(report.title, report.lead, report.chapters, pictures).encode())
    return report


def _emptied(folder: Path, keep: set[str]) -> Path:
    """Create a folder, or remove the files of an earlier report from it, except those in ``keep``."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.suffix in (".svg", ".png", ".csv", ".md", ".tex") and path.name not in keep:
            path.unlink()
    return folder


def _renamed(section: Section, ending: str) -> Section:
    """Return a section with ``ending`` added to its names, so that the files of several models do not collide."""
    if ending:
        section.tables = [dataclasses.replace(table, name=table.name + ending) for table in section.tables]
        section.figures = [dataclasses.replace(figure, name=figure.name + ending) for figure in section.figures]
    return section
