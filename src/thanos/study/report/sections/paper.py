"""Tables 2 and 3 in the paper's layout: perplexity by model, and zero-shot accuracy by task."""

from __future__ import annotations

from collections.abc import Sequence

from thanos.study.report.ranking import comparable, ranks
from thanos.study.report.results import Results, Row, percent
from thanos.study.report.sections.common import (
    BEST_NOTE,
    RANK_NOTE,
    SPREAD_NOTE,
    Section,
    best_by,
    headline_patterns,
    headline_sparsity,
    note,
)
from thanos.study.report.tables import Cell, Column, Line, columns, number, table


def perplexity_table(studies: Sequence[Results]) -> Section:
    """Return the paper's Table 2: perplexity, patterns and methods downwards, models across."""
    section = Section("table2", "Perplexity by model (the paper's Table 2)")
    rows = {
        results.model: [row for pattern in headline_patterns(results) for row in _rows(results, pattern)]
        for results in studies
    }
    keys = sorted({_key(row): row.order for own in rows.values() for row in own}.items(), key=lambda item: item[1])
    if not keys:
        section.missing.append("the headline cells with an evaluation")
        return section
    heads = [Column("Method", "method", is_text=True), *(Column(r.model, r.model) for r in studies)]
    dense = [None if r.dense is None else r.dense.mean("perplexity") for r in studies]
    lines: dict[str, list[Line]] = {"": [("Dense", *dense)]}
    for key, _ in keys:
        at = {model: next((row for row in own if _key(row) == key), None) for model, own in rows.items()}
        known = [(rows[model], row) for model, row in at.items() if row is not None]
        cells = [row and _perplexity(rows[model], row) for model, row in at.items()]
        lines.setdefault(known[0][1].pattern_label, []).append((_label(*known[-1]), *cells))
    used = [row for own in rows.values() for row in own]
    about = note(used, SPREAD_NOTE, BEST_NOTE)
    section.tables.append(table("table2", "Perplexity by model", heads, lines, about))
    return section


def zero_shot_table(results: Results) -> Section:
    """Return the paper's Table 3: zero-shot accuracy, patterns and methods downwards, tasks across."""
    section = Section("zero_shot", "Zero-shot accuracy by task (the paper's Table 3)")
    rows = [
        row
        for pattern in headline_patterns(results)
        for row in _rows(results, pattern)
        if row.mean("zero_shot") is not None
    ]
    known = [results.dense, *rows] if results.dense is not None and results.dense.mean("zero_shot") else list(rows)
    if not known:
        section.missing.append("headline cells with zero-shot tasks")
        return section
    tasks = list(
        dict.fromkeys(task for row in known for r in row.records if r.zero_shot for task in r.zero_shot["tasks"])
    )
    fields = [f"task:{task}" for task in tasks] + ["zero_shot", "zero_shot_stderr"]
    heads = [*columns("<Method|method"), *(Column(f"{task} (%)", task) for task in tasks)]
    heads += columns("average (%)|average; standard error (%)|average_stderr; <rank")
    lines: dict[str, list[Line]] = {}
    for row in known:
        peers = [other for other in rows if other.pattern_label == row.pattern_label]
        rank = ranks(peers, "zero_shot")[peers.index(row)] if row in peers else ""
        best = best_by(peers, fields[:-1])
        cells = [number(row.mean(field), best=row in best.get(field, ())) for field in fields]
        lines.setdefault(row.pattern_label if peers else "", []).append((_label(rows, row), *cells, rank))
    scored = [row.only(row.seeds_with("zero_shot")) for row in known]
    about = note(
        scored,
        _draws(scored),
        "Spread: the sample standard deviation over calibration seeds. Standard error: over the tasks' items; it is noise too.",
        BEST_NOTE,
        RANK_NOTE,
    )
    section.tables.append(table("table3", "Zero-shot accuracy by task", heads, lines, about))
    return section


def _draws(rows: Sequence[Row]) -> str:
    """Return a sentence with the number of calibration seeds behind the accuracies; the dense model has none."""
    counts = sorted({len(row.draws) for row in rows if row.method != "dense"} or {1})
    if counts == [1]:
        return "One calibration seed for each row."
    span = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    return f"Means over {span} calibration seeds{', those with the tasks' if len(counts) > 1 else ''}."


def _rows(results: Results, pattern: str) -> list[Row]:
    """Return the headline's rows with default block sizes, and Thanos with α = 0.1 as in the paper."""
    sparsity = headline_sparsity(results, pattern)
    if sparsity is None:
        return []
    rows = [row for row in results.select(pattern=pattern, sparsity=sparsity) if row.has_default_block]
    return [row for row in rows if row.alpha == 0 or (row.alpha == 0.1 and row.method == "thanos")]


def _label(rows: list[Row], row: Row) -> str:
    """Return a row's label, with the measured sparsity if it differs from that of α = 0, which the paper does not show."""
    plain = next((o for o in rows if o.pattern == row.pattern and o.alpha == 0 and o.sparsity == row.sparsity), row)
    return (
        row.label if comparable(plain, row) else f"{row.label}, only {percent(round(row.value('sparsity'), 4))} sparse"
    )


def _perplexity(rows: list[Row], row: Row) -> Cell:
    alike = [other for other in rows if other.pattern == row.pattern]
    best = row in best_by(alike, ["perplexity"])["perplexity"]
    return number(row.mean("perplexity"), row.spread("perplexity"), best=best)


def _key(row: Row) -> tuple[object, ...]:
    return (row.method, row.pattern, row.sparsity, row.alpha, row.keep_budget)
