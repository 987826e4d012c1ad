"""The table, figures and page of a comparison, made from its document alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from thanos.comparison.document import NAME, SCHEMA, Comparison, Row, groups_of, merged
from thanos.comparison.titles import titles_of
from thanos.errors import ResourceError
from thanos.events import Event
from thanos.study.report.build import Report, write_files
from thanos.study.report.figures.charts import Chart, Point, Series
from thanos.study.report.numbers import Number, Prose
from thanos.study.report.page import Chapter, slug
from thanos.study.report.sections.common import Section
from thanos.study.report.tables import Cell, Line, Table, columns, number, table
from thanos.system.documents import json_text
from thanos.system.event_stream import EventStream
from thanos.system.files import write_atomically

PAGE = "comparison.html"

_MEASURES = (
    "disk_bytes", "weight_bytes", "tokens_per_second", "first_token_seconds", "perplexity", "kl_divergence", "top1_agreement",
    "zero_shot", "zero_shot_stderr",
)  # fmt: skip
_TASK_MEASURES = ("zero_shot", "zero_shot_stderr")


def value_of(row: Row, field: str) -> float | None:
    """Return the value of a field of a row, or of ``evaluation`` or ``zero_shot`` in it; None if it was not measured."""
    if field in _TASK_MEASURES:
        average = (row.zero_shot or {}).get("average", {})
        return average.get("acc" if field == "zero_shot" else "acc_stderr")
    if field in ("perplexity", "kl_divergence", "top1_agreement"):
        return (row.evaluation or {}).get(field)
    return getattr(row, field)


def number_of(row: Row, field: str) -> Number | None:
    """Return :func:`value_of` with the row's label as its origin."""
    value = value_of(row, field)
    return None if value is None else Number(float(value), field, "value", (row.label,))


def build_report(runs: Sequence[Comparison]) -> Report:
    """Return the report, with one chapter for each group of comparable runs."""
    groups = groups_of(runs)
    chapters = []
    for position, (group, name) in enumerate(zip(groups, titles_of(groups), strict=True), 1):
        rows = merged(group)
        ending = "" if len(groups) == 1 else f"_{position}_{slug(rows[0].label)}"
        chapters.append(Chapter(name, _sections(rows, group, ending)))
    names = dict.fromkeys(row.label for group in groups for row in merged(group)[:1])
    title = f"{', '.join(names)}: size, speed and quality"
    lead: Prose = _conclusion(merged(groups[0])) if groups else ()
    if len(groups) > 1:
        lead = (f"{len(groups)} groups of models. Compare numbers only within a group.",)
        for chapter, group in zip(chapters, groups, strict=True):
            chapter.sections[0].prose.insert(0, _conclusion(merged(group)))
    return Report(title, lead, tuple(chapters))


def write_document(runs: Sequence[Comparison], folder: Path) -> None:
    """Write only the JSON document into a folder.

    Raises:
        ResourceError: the file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        document = {"schema": SCHEMA, "runs": [run.to_dict() for run in runs]}
        write_atomically(folder / NAME, json_text(document).encode())
    except OSError as error:
        raise ResourceError(f"{error.filename or folder} cannot be written: {error.strerror}") from error


def write_report(runs: Sequence[Comparison], folder: Path, on_event: Callable[[Event], None] | None = None) -> Report:
    """Write the document, the page, the tables and the figures into a folder. The same document gives the same bytes.

    Raises:
        ResourceError: matplotlib or jinja2 is not installed, or a file cannot be written.
    """
    write_document(runs, folder)
    report = build_report(runs)
    try:
        return write_files(report, folder, EventStream(on_event), page=PAGE)
    except OSError as error:
        raise ResourceError(f"{error.filename or folder} cannot be written: {error.strerror}") from error


# --- what is best ----------------------------------------------------------------------------------------------------------


def front_of(rows: Sequence[Row], cost: str, quality: str = "perplexity") -> list[Row]:
    """Return the Pareto front: the rows that no other row dominates.

    A row dominates another if it is at least as good in cost and in quality, and better in one of them. More tokens per
    second and a higher accuracy are better; of all other fields, a lower value is.
    """
    measured = [row for row in rows if value_of(row, cost) is not None and value_of(row, quality) is not None]

    def loss(row: Row, field: str) -> float:
        value = value_of(row, field)
        assert value is not None
        return -value if field in ("tokens_per_second", "zero_shot") else value

    def dominates(one: Row, other: Row) -> bool:
        pairs = [(loss(one, field), loss(other, field)) for field in (cost, quality)]
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)

    return [row for row in measured if not any(dominates(other, row) for other in measured)]


def _conclusion(rows: Sequence[Row]) -> Prose:
    """Return two sentences: the Pareto front of bytes and perplexity, and that of speed and perplexity."""
    parts: list[str | Number] = []
    for cost, words, unit in (
        ("weight_bytes", "No smaller model has a lower perplexity than", " MB"),
        ("tokens_per_second", "No faster model has a lower perplexity than", " tokens/s"),
    ):
        front = sorted(front_of(rows, cost), key=lambda row: value_of(row, cost) or 0.0)
        if not front:
            continue
        parts.append(f"{' ' if parts else ''}{words} {'this one' if len(front) == 1 else 'these'}: ")
        for position, row in enumerate(front):
            size, quality = number_of(row, cost), number_of(row, "perplexity")
            assert size is not None
            assert quality is not None
            parts += ["; " if position else "", f"{row.label} (", size, f"{unit}, perplexity ", quality, ")"]
        parts.append(".")
    return tuple(parts) or ("No model has both a size and a perplexity.",)


# --- sections --------------------------------------------------------------------------------------------------------------


def _sections(rows: list[Row], group: Sequence[Comparison], ending: str) -> list[Section]:
    summary = Section("summary", "Size, speed and quality")
    summary.tables.append(_table(rows, group[-1], ending))
    summary.figures += _charts(rows, ending)
    sections = [summary]
    texts = _texts(rows, ending)
    if texts:
        words = "Each model continues the prompt by greedy decoding."
        sections.append(Section("texts", "What the models write", prose=[(words,)], tables=texts))
    sections.append(_origin(group))
    return sections


def _table(rows: Sequence[Row], run: Comparison, ending: str) -> Table:
    shown = [
        field
        for field in _MEASURES
        if field not in _TASK_MEASURES or any(value_of(row, field) is not None for row in rows)
    ]
    notes = any(row.notes or row.reason for row in rows)
    lines: list[Line] = []
    for row in rows:
        cells: list[Cell | Number | str | None] = [row.label, *(number(number_of(row, field)) for field in shown)]
        if notes:
            cells.append(Cell(prose=(text,)) if (text := _notes(row)) else "")
        lines.append(cells)
    heads = f"<Model|model; {'; '.join(_HEADS.get(field, field) for field in shown)}"
    heads += "; <notes" if notes else ""
    settings = run.settings
    about = (
        f"MB: 10⁶ bytes. In memory: all parameters and buffers, embeddings and head included. Speed: batch 1, "
        f"{settings['context']} tokens of prompt, on {run.machine['device']}, in {settings['dtype']}"
        f"{', decoding compiled by torch.compile' if settings['compiled'] else ''}. Perplexity: {settings['text']}, "
        f"{settings['windows']} windows of {settings['sequence_length']} tokens. KL divergence and top-1 agreement: with "
        f"the first model."
    )
    if settings["tasks"]:
        limit = "" if settings["limit"] is None else f", the first {settings['limit']} documents of each"
        about += f" Zero-shot: mean accuracy over {', '.join(settings['tasks'])}{limit}, with its standard error."
    return table(f"comparison{ending}", "Models side by side", columns(heads), lines, (about,))


_HEADS = {
    "disk_bytes": "on disk (MB)|disk_bytes",
    "weight_bytes": "in memory (MB)|weight_bytes",
    "tokens_per_second": "tokens/s|tokens_per_second",
    "first_token_seconds": "first token (ms)|first_token_seconds",
}


def _notes(row: Row) -> str:
    parts = [*row.notes, *([f"failed: {row.reason}"] if row.reason else [])]
    text = ". ".join(part[:1].upper() + part[1:] for part in parts)
    return f"{text}." if text else ""


_CHARTS = (
    ("weight_bytes", "perplexity", "weights in memory (MB)", "perplexity", "Perplexity against bytes"),
    ("tokens_per_second", "perplexity", "tokens/s at batch 1", "perplexity", "Perplexity against speed"),
    ("weight_bytes", "zero_shot", "weights in memory (MB)", "zero-shot (%)", "Zero-shot accuracy against bytes"),
    ("tokens_per_second", "zero_shot", "tokens/s at batch 1", "zero-shot (%)", "Zero-shot accuracy against speed"),
)


def _charts(rows: Sequence[Row], ending: str) -> list[Chart]:
    charts = []
    for x, y, x_label, y_label, title in _CHARTS:
        front = front_of(rows, x, y)
        series = []
        for row in rows:
            x_value, y_value = number_of(row, x), number_of(row, y)
            if x_value is None or y_value is None:
                continue
            spread = number_of(row, "zero_shot_stderr") if y == "zero_shot" else None
            series.append(Series(row.label, row.kind, (Point(x_value, y_value, spread, row.label, row in front),)))
        if len(series) > 1:
            higher = y == "zero_shot"
            charts.append(
                Chart(
                    "scatter",
                    f"{y}_{x}{ending}",
                    title,
                    x_label,
                    y_label,
                    tuple(series),
                    x_scale="auto",
                    rising=x == "tokens_per_second",
                    directed=higher,
                    note=("Bars: standard error over the tasks' documents.",) if higher else (),
                )
            )
    return charts


def _texts(rows: Sequence[Row], ending: str) -> list[Table]:
    prompts = dict.fromkeys(prompt for row in rows for prompt in row.texts)
    tables = []
    for position, prompt in enumerate(prompts, 1):
        lines = [(row.label, Cell(prose=(_shown(row.texts[prompt]),))) for row in rows if prompt in row.texts]
        heads = columns("<Model|model", "<text")
        tables.append(table(f"text_{position}{ending}", f"“{prompt.strip()}”", heads, lines))
    return tables


def _shown(text: str) -> str:
    """Return a continuation without line breaks at its ends, and without a single space at its start."""
    text = text.strip("\n")
    return text if text.startswith("  ") else text.removeprefix(" ")


def _origin(group: Sequence[Comparison]) -> Section:
    section = Section("origin", "Where the numbers come from", folded=True)
    for run in group:
        machine = run.machine
        versions = {**machine["versions"], **{n: machine[n] for n in ("transformers", "torchao") if n in machine}}
        section.prose.append(
            (
                f"{run.command or 'Measured from Python'}: on {machine['device']}, {machine['date']}, commit "
                f"{machine['commit'] or 'unknown'}, {', '.join(f'{name} {value}' for name, value in versions.items())}, "
                f"{machine['threads']} threads.",
            )
        )
    section.prose.append(
        (f"The numbers of this page are in {NAME} in the same folder; thanos compare {NAME} makes the page again.",)
    )
    return section
