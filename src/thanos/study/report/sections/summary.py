"""The headline: every method at 50 %, 2:4, 4:8 and columns, and the dense model."""

from __future__ import annotations

from thanos import registry
from thanos.study.report.figures.charts import Chart, Series
from thanos.study.report.numbers import Prose, count
from thanos.study.report.ranking import ranks
from thanos.study.report.results import Results, Row, title_of
from thanos.study.report.sections.common import (
    BEST_NOTE,
    HEADLINE,
    RANK_NOTE,
    SPREAD_NOTE,
    Section,
    best_by,
    headline_rows,
    note,
    points,
)
from thanos.study.report.tables import Line, Table, measures, table

_FIELDS = ("perplexity", "kl_divergence", "top1_agreement", "zero_shot", "zero_shot_stderr", "layer_error", "seconds")
_RANKED = ("perplexity", "kl_divergence", "top1_agreement", "zero_shot", "layer_error")

METHODS = tuple(row.name for row in registry.METHODS if row.in_paper)
"""The methods that the paper compares."""


def summary(results: Results) -> Section:
    """Return the headline table and figure."""
    groups = {pattern: headline_rows(results, pattern) for pattern in HEADLINE}
    section = Section("summary", "Summary")
    section.missing = _missing(results, groups)
    rows = [row for group in groups.values() for row in group]
    if not rows and results.dense is None:
        return section
    section.tables.append(_table(results, groups))
    section.prose.append(_settings(results))
    chart = _chart(results, groups)
    if any(series.points for series in chart.series):
        section.figures.append(chart)
    return section


def _table(results: Results, groups: dict[str, list[Row]]) -> Table:
    lines: dict[str, list[Line]] = {}
    if results.dense is not None:
        lines[""] = [("Dense", "", results.dense.mean("sparsity"), *measures(results.dense, _FIELDS), "–")]
    for group in filter(None, groups.values()):
        best = best_by(group, _RANKED)
        lines[group[0].pattern_label] = [
            (row.name, rank, row.mean("sparsity"), *measures(row, _FIELDS, best), count(row.draws))
            for row, rank in zip(group, ranks(group), strict=True)
        ]
    about = note([row for group in groups.values() for row in group], SPREAD_NOTE, BEST_NOTE, RANK_NOTE)
    heads = f"<Method|method; <rank; sparsity; {'; '.join(_FIELDS)}; seeds"
    return table("summary", "Methods at the headline settings", heads, lines, about)


def _settings(results: Results) -> Prose:
    calibration, samples, length, damping = results.base
    first = next((r for row in results.rows for r in row.records if r.evaluation), None)
    damped = f"; damping {damping:g}" if damping is not None else ""
    words = [f"Calibration: {samples} × {length} tokens of {calibration}{damped}." if calibration else ""]
    if first is not None and first.evaluation is not None:
        found = first.evaluation
        words.append(
            f" Perplexity: {found['text']}, {found['windows']} windows of {found['sequence_length']} tokens "
            f"({found['tokens']:,} scored). KL divergence and top-1 agreement compare with the dense model."
        )
    return ("".join(words).strip(),)


def _chart(results: Results, groups: dict[str, list[Row]]) -> Chart:
    series = []
    for group in groups.values():
        found = points(group, "sparsity", "perplexity", label=lambda row: row.name)
        if found:
            series.append(Series(group[0].pattern_label, found[0].style, found))
    dense = None if results.dense is None else results.dense.mean("perplexity")
    reference = None if dense is None else ("dense", dense)
    return Chart("dots", "summary", "Perplexity by pattern and method", "", "perplexity", tuple(series), reference)


def _missing(results: Results, groups: dict[str, list[Row]]) -> list[str]:
    found = [] if results.dense is not None else ["the dense model"]
    for pattern, group in groups.items():
        have = {row.method for row in group}
        lacking = [title_of(method) for method in METHODS if method not in have]
        if lacking:
            label = group[0].pattern_label if group else f"{pattern}{'' if ':' in pattern else ' 50 %'}"
            label = label if group or pattern != "columns" else "columns 30 %"
            found.append(f"{label}: {', '.join(lacking)}")
    return found
