"""Accuracy against cost: who is on the Pareto front, and what a point of perplexity costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from thanos.study.report.charts import Chart, Point, Series, pareto
from thanos.study.report.ranking import comparable
from thanos.study.report.rows import Results, Row
from thanos.study.report.sections.alpha import file_name
from thanos.study.report.sections.common import COST_ONLY, HEADLINE, Section, headline_sparsity, note
from thanos.study.report.tables import Cell, Table, columns, measures, number, text
from thanos.study.report.values import FIELDS, Prose, difference, price

_COSTS = {"seconds": "pruning time (s)", "peak_bytes": FIELDS["peak_bytes"].label}
_SHORT = {"seconds": "time", "peak_bytes": "memory"}
_MEMORY_HEAD = "peak memory above what is held (GiB)|peak_bytes"
_MEMORY: Prose = (
    "Memory is the peak of pruning above what the study's process holds anyway (the dense model and its outputs, kept from one "
    "cell to the next): the peak less the least peak among the phases of pruning; on the host where there is no device.",
)
SAME_MEMORY = 0.01
"""Peaks that differ by no more than this share count as equal."""


def cost(results: Results) -> Section:
    """Return perplexity against seconds and memory for each headline pattern, and the marginal cost of Thanos."""
    if results.cost_only:
        return _without_accuracy(results)
    section = Section("cost", "Accuracy against cost")
    section.prose.append(
        (
            "Rows of one pattern and equal measured sparsity, measured on the same device. Ringed and joined: the Pareto "
            "front, rows that no other beats in both. Cells that shared their device with others give no seconds.",
        )
    )
    section.prose.append(_MEMORY)
    device = _usual_device(results)
    lines: list[tuple[Cell, ...]] = []
    bands: dict[int, str] = {}
    used: list[Row] = []
    for pattern, rows in _measured_alike(results, device, section):
        label = rows[0].pattern_label
        alike = _same_memory(label, rows)
        shown = [field for field in _COSTS if field == "seconds" or not alike]
        fronts = {field: _front(rows, field) for field in shown}
        section.figures += [_chart(rows, field, fronts[field], pattern, label) for field in shown if fronts[field]]
        if alike:
            section.prose.append(alike)
        bands[len(lines)] = label
        lines += [_line(rows, row, fronts) for row in rows]
        used += rows
    if lines:
        section.prose.append((f"Device: {device}.",))
        heads = columns(
            "<Method|method",
            "sparsity (%)|sparsity",
            "perplexity",
            "pruning (s)|seconds",
            _MEMORY_HEAD,
            "<Pareto front|front",
            "s more than SparseGPT|seconds_difference",
            "s per point of perplexity|price",
        )
        about = note(
            used, "The last column: seconds more than SparseGPT for each point of perplexity less; – where not less."
        )
        section.tables.append(Table("cost", "Cost and marginal cost", heads, tuple(lines), bands, about))
    return section


def _without_accuracy(results: Results) -> Section:
    """Return seconds and memory of every method, of a model that was not evaluated."""
    section = Section("cost", "What do the methods cost?", prose=[COST_ONLY, _MEMORY])
    device = _usual_device(results)
    lines: list[tuple[Cell, ...]] = []
    bands: dict[int, str] = {}
    series: list[Series] = []
    used: list[Row] = []
    for _, rows in _measured_alike(results, device, section):
        bands[len(lines)] = rows[0].pattern_label
        lines += [_cost_line(rows, row) for row in rows]
        used += rows
        points = [
            Point(x, y, row.spread("seconds"), row.label, style=row.method)
            for row in rows
            if (x := row.mean("sparsity")) is not None and (y := row.mean("seconds")) is not None
        ]
        series.append(Series(rows[0].pattern_label, points[0].style, tuple(points)))
    if lines:
        section.prose.append((f"Device: {device}.",))
        heads = columns(
            "<Method|method",
            "sparsity (%)|sparsity",
            "layer error|layer_error",
            "pruning (s)|seconds",
            "of it solving (s)|solve_seconds",
            _MEMORY_HEAD,
            "s more than SparseGPT|seconds_difference",
        )
        section.tables.append(Table("cost", "Cost of the methods", heads, tuple(lines), bands, note(used)))
        title = "Pruning time by pattern and method"
        section.figures.append(Chart("dots", "cost_seconds", title, "", _COSTS["seconds"], tuple(series)))
    return section


def _cost_line(rows: list[Row], row: Row) -> tuple[Cell, ...]:
    other = next((o for o in rows if o.method == "sparsegpt" and o.alpha == 0), None)
    mine, theirs = row.mean("seconds"), None if other is None else other.mean("seconds")
    more = difference(mine, theirs) if row is not other and mine is not None and theirs is not None else None
    fields = ("sparsity", "layer_error", "seconds", "solve_seconds", "peak_bytes")
    return (text(row.label), *measures(row, fields), number(more))


def _measured_alike(results: Results, device: str, section: Section) -> Iterator[tuple[str, list[Row]]]:
    """Yield each headline pattern with the rows that one device measured; the section misses those with fewer than two."""
    for pattern in HEADLINE:
        rows = [row for row in _rows(results, pattern) if all(r.machine["device"] == device for r in row.records)]
        if len(rows) < 2:
            section.missing.append(f"{pattern}: at least two methods at one sparsity on one device")
        else:
            yield pattern, rows


def _usual_device(results: Results) -> str:
    counts = Counter(r.machine["device"] for row in results.rows for r in row.records)
    return max(counts, key=lambda name: (counts[name], name), default="")


def _rows(results: Results, pattern: str) -> list[Row]:
    """Return the rows at the headline's measured sparsity: every method, and Thanos with the paper's α of 0.1."""
    sparsity = headline_sparsity(results, pattern)
    if sparsity is None:
        return []
    rows = [row for row in results.select(pattern=pattern, sparsity=sparsity) if row.has_default_block]
    needed = ("seconds",) if results.cost_only else ("perplexity", "seconds")
    rows = [row for row in rows if all(row.mean(field) is not None for field in needed)]
    plain = [row for row in rows if row.alpha == 0]
    base = next((row for row in plain if row.method == "thanos"), plain[0] if plain else None)
    if base is None:
        return []
    alike = [row for row in rows if comparable(row, base)]
    return [row for row in alike if row.alpha == 0 or (row.alpha == 0.1 and row.method == "thanos")]


def _front(rows: list[Row], field: str) -> list[Row]:
    able = [row for row in rows if row.mean(field) is not None]
    alike = SAME_MEMORY if field == "peak_bytes" else 0.0
    on = pareto([(row.value(field), row.value("perplexity")) for row in able], alike)
    return [row for row, first in zip(able, on, strict=True) if first]


def _same_memory(label: str, rows: list[Row]) -> Prose:
    """Say that all rows take the same memory; nothing where they do not, or where it is not known of two rows."""
    known = sorted((n for row in rows if (n := row.mean("peak_bytes")) is not None), key=lambda number: number.value)
    if len(known) < 2 or known[-1].value > known[0].value * (1 + SAME_MEMORY):
        return ()
    return (f"{label}: all methods take the same memory within {100 * SAME_MEMORY:g} %, ", known[-1], " GiB at most.")


def _chart(rows: list[Row], field: str, front: list[Row], pattern: str, label: str) -> Chart:
    series = []
    for row in rows:
        x, y = row.mean(field), row.mean("perplexity")
        if x is not None and y is not None:
            point = Point(x, y, row.spread("perplexity"), row.label.replace("budget kept", "kept"), row in front)
            series.append(Series(row.label, row.method, (point,)))
    name = f"cost_{file_name(pattern)}_{'seconds' if field == 'seconds' else 'memory'}"
    title = f"Perplexity against {'pruning time' if field == 'seconds' else 'peak memory'}, {label}"
    return Chart("scatter", name, title, _COSTS[field], "perplexity", tuple(series), x_scale="auto")


def _line(rows: list[Row], row: Row, fronts: dict[str, list[Row]]) -> tuple[Cell, ...]:
    other = next((o for o in rows if o.method == "sparsegpt" and o.alpha == 0), None)
    more, per_point = None, None
    if row.method == "thanos" and other is not None and comparable(row, other):
        times, quality = [[r.mean(name) for r in (row, other)] for name in ("seconds", "perplexity")]
        if None not in times and None not in quality:
            more = difference(times[0], times[1])  # type: ignore[arg-type]
            per_point = price((times[0], times[1]), (quality[0], quality[1]))  # type: ignore[arg-type]
    where = " and ".join(_SHORT[name] for name in fronts if row in fronts[name])
    return (
        text(row.label),
        number(row.mean("sparsity")),
        number(row.mean("perplexity"), row.spread("perplexity")),
        number(row.mean("seconds"), row.spread("seconds")),
        number(row.mean("peak_bytes")),
        text(where),
        number(more),
        number(per_point),
    )
