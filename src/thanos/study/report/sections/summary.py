"""The main table of a study: all rows of a small study, or each method at the headline's sparsities."""

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
    headline_patterns,
    headline_rows,
    note,
    points,
)
from thanos.study.report.tables import Line, Table, measures, table

_FIELDS = ("perplexity", "kl_divergence", "top1_agreement", "zero_shot", "zero_shot_stderr", "layer_error", "seconds")
_RANKED = ("perplexity", "kl_divergence", "top1_agreement", "zero_shot", "layer_error")

FEW_ROWS = 24
"""The main table shows all rows of a study with at most this many rows, and otherwise only the headline's rows."""

METHODS = tuple(row.name for row in registry.METHODS if row.in_paper)
"""The methods that the paper compares."""


def summary(results: Results) -> Section:
    """Return the main table and figure."""
    groups = groups_of(results)
    section = Section("summary", "Summary")
    section.missing = _missing(results)
    if not groups and results.dense is None:
        return section
    section.tables.append(_table(results, groups))
    section.prose.append(_settings(results))
    chart = _chart(results, groups)
    if any(series.points for series in chart.series):
        section.figures.append(chart)
    return section


def groups_of(results: Results) -> dict[str, list[Row]]:
    """Return the rows that the summary shows, by the label of their pattern and sparsity.

    These are all rows, repaired ones included, if there are at most :data:`FEW_ROWS`. Otherwise they are each method's row with
    α = 0 and the default block size, at the headline's sparsity of each pattern.
    """
    rows = sorted((*results.rows, *results.scoped, *results.repaired), key=lambda row: row.order)
    if len(rows) > FEW_ROWS:
        rows = [row for pattern in headline_patterns(results) for row in headline_rows(results, pattern)]
    else:
        order = {pattern: index for index, pattern in enumerate(headline_patterns(results))}
        rows.sort(key=lambda row: order.get(row.pattern, len(order)))
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.pattern_label, []).append(row)
    return groups


def _table(results: Results, groups: dict[str, list[Row]]) -> Table:
    lines: dict[str, list[Line]] = {}
    rows = [row for group in groups.values() for row in group]
    known = [row for row in (results.dense, *rows) if row is not None]
    fields = [field for field in _FIELDS if any(row.mean(field) is not None for row in known)]
    if results.dense is not None:
        lines[""] = [("Dense", "", results.dense.mean("sparsity"), *measures(results.dense, fields), "–")]
    for label, group in groups.items():
        best = best_by(group, _RANKED)
        lines[label] = [
            (row.label, rank, row.mean("sparsity"), *measures(row, fields, best), count(row.draws))
            for row, rank in zip(group, ranks(group), strict=True)
        ]
    about = note(rows, SPREAD_NOTE, BEST_NOTE, RANK_NOTE)
    heads = f"<Method|method; <rank; sparsity; {'; '.join([*fields, 'seeds'])}"
    return table("summary", "Results of the pruned models", heads, lines, about)


def _settings(results: Results) -> Prose:
    calibration, samples, length, damping = results.base
    first = next((r for row in results.rows for r in row.records if r.evaluation), None)
    damped = f"; damping {damping:g}" if damping is not None else ""
    words = [f"Calibration: {samples} × {length} tokens of {calibration}{damped}." if calibration else ""]
    if first is not None and first.evaluation is not None:
        evaluation = first.evaluation
        compared = " KL divergence and top-1 agreement compare with the dense model."
        words.append(
            f" Perplexity: {evaluation['text']}, {evaluation['windows']} windows of {evaluation['sequence_length']} tokens "
            f"({evaluation['tokens']:,} scored).{compared if evaluation['kl_divergence'] is not None else ''}"
        )
    return ("".join(words).strip(),)


def _chart(results: Results, groups: dict[str, list[Row]]) -> Chart:
    series = []
    for label, group in groups.items():
        drawn = points(group, "sparsity", "perplexity", label=lambda row: row.label)
        if drawn:
            series.append(Series(label, drawn[0].style, drawn))
    dense = None if results.dense is None else results.dense.mean("perplexity")
    reference = None if dense is None else ("dense", dense)
    return Chart("dots", "summary", "Perplexity by pattern and method", "", "perplexity", tuple(series), reference)


def _missing(results: Results) -> list[str]:
    missing = [] if results.dense is not None else ["the dense model"]
    for pattern in HEADLINE:
        group = headline_rows(results, pattern)
        have = {row.method for row in group}
        lacking = [title_of(method) for method in METHODS if method not in have]
        if lacking:
            label = group[0].pattern_label if group else f"{pattern}{'' if ':' in pattern else ' 50 %'}"
            label = label if group or pattern != "columns" else "columns 30 %"
            missing.append(f"{label}: {', '.join(lacking)}")
    return missing
