"""Accuracy against cost: the methods on the Pareto front, and the price of a point of perplexity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from thanos.study.report.figures.charts import Chart, Series
from thanos.study.report.numbers import FIELDS, Number, Prose, price
from thanos.study.report.ranking import change_of, comparable, one_seed, pareto, verdict
from thanos.study.report.results import Results, Row, over_common_seeds
from thanos.study.report.sections.alpha import file_name
from thanos.study.report.sections.common import (
    COST_ONLY,
    SPREAD_NOTE,
    Section,
    counted,
    headline_patterns,
    headline_sparsity,
    note,
    points,
)
from thanos.study.report.tables import Cell, Line, measures, number, table, text

_COSTS = {"seconds": "pruning time (s)", "peak_bytes": FIELDS["peak_bytes"].label}
_SHORT = {"seconds": "time", "peak_bytes": "memory"}
_COST_FIELDS = ("sparsity", "layer_error", "seconds", "solve_seconds", "peak_bytes")
_MEMORY: Prose = (
    "Memory is the peak of pruning minus the smallest peak among its phases, of the device, or of the host without one. So it "
    "leaves out what the study's process keeps between cells, the dense model and its outputs, which no method needs.",
)
_MORE = "s more than SparseGPT|seconds_difference"
"""Heading and name of the column with the seconds that a row takes more than SparseGPT's."""

_DIFFERENCE = "Seconds more than SparseGPT: over the seeds that both rows have; = within the noise, ° only one seed."
_PRICE = (
    "Last column: additional seconds over SparseGPT for each point by which the perplexity is lower. =: the seconds are a tie. "
    "–: the perplexity is not lower by more than the noise."
)
SAME_MEMORY = 0.01
"""Peaks that differ by no more than this fraction count as equal."""


def cost(results: Results) -> Section:
    """Return perplexity against seconds and memory for each headline pattern, and the marginal cost of Thanos."""
    if results.cost_only:
        return _without_accuracy(results)
    section = Section("cost", "Accuracy against cost")
    section.prose.append(
        (
            "Rows of one pattern and equal measured sparsity, measured on one device. Rings and a line mark the Pareto front: "
            "the rows that no other row beats in one quantity, by more than the noise, without being worse in the other. Cells "
            "that shared their device with others have no seconds.",
        )
    )
    section.prose.append(_MEMORY)
    lent = noise_of_seconds(results)
    lines: dict[str, list[Line]] = {}
    used: list[Row] = []
    for pattern, rows in _measured_alike(results, section):
        label = rows[0].pattern_label
        alike = _same_memory(label, rows)
        shown = [field for field in _COSTS if field == "seconds" or not alike]
        fronts = {field: _front(rows, field, lent) for field in shown}
        section.figures += [_chart(rows, field, fronts[field], pattern, label) for field in shown if fronts[field]]
        if alike:
            section.prose.append(alike)
        lines[label] = [_line(rows, row, fronts, lent) for row in rows]
        used += rows
    if lines:
        section.prose.append((f"Device: {usual_device(results)}.",))
        section.prose.append(_noise_note(lent))
        heads = "<Method|method; sparsity; perplexity; seconds; peak_bytes; <Pareto front|front"
        if {"thanos", "sparsegpt"} <= {row.method for row in used}:
            heads += f"; {_MORE}; s per point of perplexity|price"
            about, title = note(used, SPREAD_NOTE, _DIFFERENCE, _PRICE), "Cost and marginal cost"
        else:  # the marginal cost compares the two methods
            lines = {label: [line[:-2] for line in own] for label, own in lines.items()}
            about, title = note(used, SPREAD_NOTE), "Cost"
        section.tables.append(table("cost", title, heads, lines, about))
    return section


def noise_of_seconds(results: Results) -> Number | None:
    """Return the largest spread of seconds among the rows of the table, which is used for rows with one seed."""
    rows = [row for pattern in headline_patterns(results) for row in _rows(results, pattern)]
    spreads = [found for row in rows if (found := row.spread("seconds")) is not None]
    return max(spreads, key=lambda number: number.value, default=None)


def _noise_note(lent: Number | None) -> Prose:
    if lent is None:
        return ("No row has seconds of several seeds, so their noise is unknown.",)
    return (
        "Seconds count as equal if they differ by no more than the larger spread. For a row with one seed it is set to ",
        lent,
        " s.",
    )


def _without_accuracy(results: Results) -> Section:
    """Return seconds and memory of every method, for a model that was not evaluated."""
    section = Section("cost", "Cost of the methods", prose=[COST_ONLY, _MEMORY])
    lent = noise_of_seconds(results)
    lines: dict[str, list[Line]] = {}
    series: list[Series] = []
    used: list[Row] = []
    for _, rows in _measured_alike(results, section):
        lines[rows[0].pattern_label] = [_cost_line(rows, row, lent) for row in rows]
        used += rows
        drawn = points(rows, "sparsity", "seconds", label=lambda row: row.label)
        series.append(Series(rows[0].pattern_label, drawn[0].style, drawn))
    if lines:
        section.prose.append((f"Device: {usual_device(results)}.",))
        section.prose.append(_noise_note(lent))
        heads = f"<Method|method; {'; '.join(_COST_FIELDS)}; {_MORE}"
        about = note(used, SPREAD_NOTE, _DIFFERENCE)
        section.tables.append(table("cost", "Cost of the methods", heads, lines, about))
        title = "Pruning time by pattern and method"
        section.figures.append(Chart("dots", "cost_seconds", title, "", _COSTS["seconds"], tuple(series)))
    return section


def _cost_line(rows: list[Row], row: Row, lent: Number | None) -> Line:
    other = _sparsegpt(rows)
    more = None if other is None or other is row else _more(row, other, lent)
    return (row.label, *measures(row, _COST_FIELDS), more)


def _sparsegpt(rows: list[Row]) -> Row | None:
    return next((row for row in rows if row.method == "sparsegpt" and row.alpha == 0), None)


def _more(row: Row, other: Row, lent: Number | None) -> Cell:
    """Return a cell with a row's seconds minus those of another, over their common seeds, with a mark for a tie."""
    tie = "=" if verdict(row, other, "seconds", lent) == "tie" else ""
    return number(change_of(row, other, "seconds"), mark=tie + one_seed(row, other, field="seconds"))


def costs_by_pattern(results: Results) -> dict[str, list[Row]]:
    """Return the rows of the table by the label of their pattern."""
    return {rows[0].pattern_label: rows for pattern in headline_patterns(results) if (rows := _rows(results, pattern))}


def _measured_alike(results: Results, section: Section) -> Iterator[tuple[str, list[Row]]]:
    """Yield each headline pattern with its rows from one device. Patterns with fewer than two are listed as missing."""
    for pattern in headline_patterns(results):
        rows = _rows(results, pattern)
        if len(rows) < 2:
            section.missing.append(f"{pattern}: at least two methods at one sparsity on one device")
        else:
            yield pattern, rows


def on_device(rows: list[Row], device: str) -> list[Row]:
    """Return rows with only the cells that one device measured. Seconds of another device are not comparable."""
    on_this = [tuple(record for record in row.records if record.machine["device"] == device) for row in rows]
    return [replace(row, records=own) for row, own in zip(rows, on_this, strict=True) if own]


def usual_device(results: Results) -> str:
    """Return the device that measured most cells."""
    counts = Counter(r.machine["device"] for row in results.rows for r in row.records)
    return max(counts, key=lambda name: (counts[name], name), default="")


def _rows(results: Results, pattern: str) -> list[Row]:
    """Return the rows at the headline's measured sparsity: those of every method, and Thanos with the paper's α of 0.1."""
    sparsity = headline_sparsity(results, pattern)
    if sparsity is None:
        return []
    rows = [row for row in results.select(pattern=pattern, sparsity=sparsity) if row.has_default_block]
    rows = on_device(rows, usual_device(results))
    needed = ("seconds",) if results.cost_only else ("perplexity", "seconds")
    rows = [row for row in rows if all(row.mean(field) is not None for field in needed)]
    plain = [row for row in rows if row.alpha == 0]
    base = next((row for row in plain if row.method == "thanos"), plain[0] if plain else None)
    if base is None:
        return []
    alike = [row for row in rows if comparable(row, base)]
    return [row for row in alike if row.alpha == 0 or (row.alpha == 0.1 and row.method == "thanos")]


def _front(rows: list[Row], field: str, lent: Number | None) -> list[Row]:
    def costs(first: Row, second: Row) -> str:
        if field == "seconds":
            return verdict(first, second, "seconds", lent)
        a, b = first.value(field), second.value(field)
        return "tie" if max(a, b) <= min(a, b) * (1 + SAME_MEMORY) else "better" if a < b else "worse"

    return pareto([row for row in rows if row.mean(field) is not None], costs)


def _same_memory(label: str, rows: list[Row]) -> Prose:
    """Return a sentence that states that all rows need the same memory; empty if they do not, or fewer than two are known."""
    known = sorted((n for row in rows if (n := row.mean("peak_bytes")) is not None), key=lambda number: number.value)
    if len(known) < 2 or known[-1].value > known[0].value * (1 + SAME_MEMORY):
        return ()
    names = counted([row.label for row in rows if row.mean("peak_bytes") is not None], "row")
    return (f"{label}: {names} need the same memory within {100 * SAME_MEMORY:g} %, at most ", known[-1], " GiB.")


def _chart(rows: list[Row], field: str, front: list[Row], pattern: str, label: str) -> Chart:
    drawn = [(row, points([row], field, "perplexity")) for row in rows]
    series = [
        Series(row.label.replace("budget kept", "kept"), row.method, (replace(point, marked=row in front),))
        for row, own in drawn
        for point in own
    ]
    name = f"cost_{file_name(pattern)}_{'seconds' if field == 'seconds' else 'memory'}"
    title = f"Perplexity against {'pruning time' if field == 'seconds' else 'peak memory'}, {label}"
    return Chart("scatter", name, title, _COSTS[field], "perplexity", tuple(series), x_scale="auto")


def _line(rows: list[Row], row: Row, fronts: dict[str, list[Row]], lent: Number | None) -> Line:
    other = _sparsegpt(rows) if row.method == "thanos" else None
    where = " and ".join(_SHORT[name] for name in fronts if row in fronts[name])
    more = (None, None) if other is None else (_more(row, other, lent), _price(row, other, lent))
    return (row.label, row.mean("sparsity"), *measures(row, ("perplexity", "seconds", "peak_bytes")), where, *more)


def _price(row: Row, other: Row, lent: Number | None) -> Cell:
    """Return a cell with the price of a point of perplexity, over the seeds with seconds and perplexity in both rows."""
    own, theirs = over_common_seeds(*over_common_seeds(row, other), field="seconds")
    seconds = own.mean("seconds"), theirs.mean("seconds")
    quality = own.mean("perplexity"), theirs.mean("perplexity")
    if None in seconds or None in quality or verdict(own, theirs) != "better":
        return number(None)
    if verdict(own, theirs, "seconds", lent) == "tie":
        return text("=")
    return number(price(seconds, quality), mark=one_seed(own, theirs, field="seconds"))  # type: ignore[arg-type]
