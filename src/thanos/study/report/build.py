"""Build a report from a store, and write its files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from thanos.errors import DataError, ResourceError
from thanos.events import Event
from thanos.study.report.figures.charts import Figure
from thanos.study.report.figures.draw import draw
from thanos.study.report.numbers import Prose, count
from thanos.study.report.page import Chapter, render_page, slug
from thanos.study.report.results import Results, models_of
from thanos.study.report.sections import COST_SECTIONS, MODEL_SECTIONS, data
from thanos.study.report.sections.common import Section
from thanos.study.report.sections.paper import perplexity_table
from thanos.study.report.tables import WRITERS, Table
from thanos.study.store import Contents, read_store, store_path
from thanos.system.event_stream import EventStream
from thanos.system.files import write_atomically

PAGE = "report.html"


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
    """Return the report of a store's contents."""
    models = models_of(contents.records)
    studies = [Results(model, contents.done) for model in models]
    chapters = []
    for results in studies:
        sections = [section(results) for section in (COST_SECTIONS if results.cost_only else MODEL_SECTIONS)]
        sections = [s for s in sections if s.tables or s.figures or s.missing]
        ending = "" if len(models) == 1 else f"_{slug(results.model)}"
        chapters.append(Chapter(results.model, [_renamed(section, ending) for section in sections]))
    evaluated = [results for results in studies if not results.cost_only]
    shared = [perplexity_table(evaluated)] if evaluated else []
    chapters.append(Chapter("", [*shared, data(contents.done, contents.failed, studies)]))
    title = f"Pruning {', '.join(models)}" if models else "An empty study"
    done, failed = len(contents.done), len(contents.failed)
    lead: Prose = (
        "A study of ",
        count(contents.done),
        f" {'cell' if done == 1 else 'cells'}",
        *([", ", count(contents.failed), " more failed"] if failed else []),
        ". Every number on this page is read from its store or derived from it.",
        *_incomplete(chapters),
    )
    return Report(title, lead, tuple(chapters))


def _incomplete(chapters: list[Chapter]) -> Prose:
    """Return a sentence that names the sections with missing cells; each section lists its own at the end."""
    lacking = dict.fromkeys(s.title for chapter in chapters for s in chapter.sections if s.missing)
    if not lacking:
        return ()
    names = ", ".join(f"“{title}”" for title in lacking)
    return (
        f" The study is not complete: the cells that are missing are listed at the end of these sections: {names}.",
    )


def write_report(folder: str | Path, on_event: Callable[[Event], None] | None = None) -> Report:
    """Write ``report.html``, ``tables/`` and ``figures/`` into a study's folder. The same store gives the same bytes.

    Args:
        folder: the study's folder, which holds ``store.jsonl``.
        on_event: called with each progress event.

    Raises:
        DataError: there is no store, or it has no record.
        ResourceError: matplotlib is not installed, or a file cannot be written.
    """
    path = store_path(folder)
    contents = read_store(path)
    if not contents.records:
        raise DataError(f"{path} holds no record; run the study first: thanos study STUDY.toml {path.parent}")
    report = build_report(contents)
    try:
        return write_files(report, path.parent, EventStream(on_event))
    except OSError as error:
        raise ResourceError(f"{error.filename or path.parent} cannot be written: {error.strerror}") from error


def write_files(report: Report, out: Path, tell: Callable[[Event], None], *, page: str = PAGE) -> Report:
    """Write a report's page, ``tables/`` and ``figures/`` into a folder, and remove those of an earlier one.

    Args:
        report: the report.
        out: the folder.
        tell: called with each progress event.
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
        tell(Event(kind="progress", phase="draw", done=done, total=len(report.figures)))
    tables = _emptied(out / "tables", {f"{t.name}.{ending}" for t in report.tables for ending in WRITERS})
    for table in report.tables:
        for ending, writer in WRITERS.items():
            write_atomically(tables / f"{table.name}.{ending}", writer(table).encode())
    write_atomically(out / page, render_page(report.title, report.lead, report.chapters, pictures).encode())
    return report


def _emptied(folder: Path, keep: set[str]) -> Path:
    """Make a folder. Remove the files of an earlier report that this one does not write again."""
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
