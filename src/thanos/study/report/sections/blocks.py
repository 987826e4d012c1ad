"""Block size: how it affects the perplexity and the time of Thanos, for each pattern."""

from __future__ import annotations

from thanos.study.report.figures.charts import Chart, Series
from thanos.study.report.numbers import Number, Prose
from thanos.study.report.ranking import change_of, comparable, larger_noise, one_seed, verdict
from thanos.study.report.results import Results, Row, over_common_seeds
from thanos.study.report.sections.alpha import file_name
from thanos.study.report.sections.common import (
    BAR_NOTE,
    COST_ONLY,
    SIGNS,
    SPREAD_NOTE,
    Section,
    common_note,
    note,
    own,
    points,
    seeds_of,
)
from thanos.study.report.tables import Line, Table, measures, table

SIZES = tuple(2**power for power in range(3, 12))
PATTERNS = ("unstructured", "4:8", "2:4")
_FIELDS = ("layer_error", "perplexity", "kl_divergence", "seconds", "solve_seconds")
_COST_FIELDS = ("layer_error", "seconds", "solve_seconds")
_RULE: Prose = (
    "Rule: smaller blocks are worth it if one has a lower perplexity than the largest measured block, by more than the noise. "
    "If it is a tie, the seconds decide.",
)
_SIGN_NOTE = (
    "< lower perplexity than the largest B, > higher, = within the noise, which is the larger of the two spreads. ° only one "
    "seed; its spread is taken from the same pattern with another B."
)
_CHARTS = {"perplexity": "perplexity", "layer_error": "mean relative layer error", "seconds": "pruning (s)"}


def blocks(results: Results) -> Section:
    """Return tables and figures over the block size, and a verdict for each pattern."""
    section = Section("blocks", "Block size: are small blocks worth it?")
    if results.cost_only:
        section = Section("blocks", "Cost of the block size", prose=[COST_ONLY])
    else:
        section.prose.append(_RULE)
    rows_by_label: dict[str, list[Row]] = {}
    whole: list[Row] = []
    for pattern in PATTERNS:
        rows = sizes(results, pattern)
        label = rows[0].pattern_label if rows else pattern if ":" in pattern else f"{pattern} 50 %"
        have = {row.block_size for row in rows}
        lacking = [str(size) for size in SIZES if size not in have]
        if lacking:
            section.missing.append(f"Thanos, {label}, B = {', '.join(lacking)}")
        shared = list(over_common_seeds(*rows, field="sparsity" if results.cost_only else "perplexity"))
        if len(rows) > 1 and not shared[0].records:
            section.missing.append(f"Thanos, {label}: a seed that every B has")
        elif len(rows) > 1:
            whole += rows
            rows_by_label[label] = rows = shared
            section.prose.append(_costs(label, rows) if results.cost_only else _answer(label, rows))
            section.figures += [
                _chart([(label, rows)], field, f"blocks_{file_name(pattern)}_{field}", label)
                for field in ("perplexity", "layer_error")
            ]
    if rows_by_label:
        section.tables.append(_table(rows_by_label, whole, cost_only=results.cost_only))
        section.figures.append(
            _chart(list(rows_by_label.items()), "seconds", "blocks_seconds", ", ".join(rows_by_label))
        )
    section.figures = [figure for figure in section.figures if isinstance(figure, Chart) and figure.series]
    return section


def sizes(results: Results, pattern: str) -> list[Row]:
    """Return Thanos's rows over B with α = 0, of equal measured sparsity, at the sparsity with the most block sizes.

    If the model was evaluated, rows without a perplexity are left out.
    """
    rows = [row for row in results.select(method="thanos", pattern=pattern, alpha=0.0) if row.block_size is not None]
    rows = [row for row in rows if results.cost_only or row.mean("perplexity") is not None]
    if not rows:
        return []
    counts = {sparsity: sum(row.sparsity == sparsity for row in rows) for sparsity in {row.sparsity for row in rows}}
    usual = max(counts, key=lambda sparsity: (counts[sparsity], -abs(sparsity - 0.5)))
    chosen = sorted((row for row in rows if row.sparsity == usual), key=lambda row: row.block_size or 0)
    return [row for row in chosen if comparable(row, chosen[-1])]


def _answer(label: str, rows: list[Row]) -> Prose:
    """Compare the best of the smaller blocks with the largest block. All rows must have the same seeds."""
    whole, best = rows[-1], min(rows[:-1], key=lambda row: row.value("perplexity"))
    means = [row.mean("perplexity") for row in (best, whole)]
    s, t = best.mean("seconds"), whole.mean("seconds")
    noise, mark = larger_noise(best, whole), one_seed(*rows)
    word = {"better": "worth it", "worse": "not worth it"}.get(verdict(best, whole), _by_time(best, whole))
    word = f"from one seed, {word}" if mark else word
    words: list[str | Number | None] = [f"{label}: {word}{mark}. B = ", own(best, "block_size")]
    words += [" against ", own(whole, "block_size"), ": perplexity ", means[0], " against ", means[1]]
    words += [" (", change_of(best, whole), ")"]
    words += [", pruning ", s, " s against ", t, " s"] if s is not None and t is not None else []
    words += [f", over {seeds_of(rows)}"]
    words += ["; noise unknown."] if noise is None else ["; noise ", noise, "."]
    return tuple(word for word in words if word is not None)


def _by_time(best: Row, whole: Row) -> str:
    """Return in words which of two rows of equal perplexity is faster."""
    faster = verdict(best, whole, "seconds")
    if faster in ("better", "worse"):
        return f"a tie, and {'faster, so worth it' if faster == 'better' else 'slower, so not worth it'}"
    return "a tie, also in time" if faster else "a tie, with unknown time"


def _costs(label: str, rows: list[Row]) -> Prose:
    timed = [row for row in rows if row.mean("seconds") is not None]
    if not timed:
        return (f"{label}: time was not measured.",)
    fastest = min(timed, key=lambda row: row.value("seconds"))
    words: list[str | Number | None] = [
        f"{label}: pruning is fastest with B = ",
        own(fastest, "block_size"),
    ]
    words += [", ", fastest.mean("seconds"), " s"]
    for row in (timed[0], timed[-1]):
        if row is not fastest:
            words += ["; B = ", own(row, "block_size"), ": ", row.mean("seconds"), " s"]
    return tuple(word for word in (*words, ".") if word is not None)


def _table(rows_by_label: dict[str, list[Row]], whole: list[Row], *, cost_only: bool) -> Table:
    fields = _COST_FIELDS if cost_only else _FIELDS

    def line(rows: list[Row], row: Row) -> Line:
        sign = "" if row is rows[-1] else SIGNS[verdict(row, rows[-1])] + one_seed(row, rows[-1])
        values = (own(row, "block_size"), *measures(row, fields), row.mean("sparsity"))
        return values if cost_only else (*values, sign)

    used = [row for rows in rows_by_label.values() for row in rows]
    about = note(used, common_note(whole, used), *(() if cost_only else (SPREAD_NOTE, _SIGN_NOTE)))
    heads = f"block_size; {'; '.join(fields)}; sparsity" + ("" if cost_only else "; <against the largest B|verdict")
    lines = {label: [line(rows, row) for row in rows] for label, rows in rows_by_label.items()}
    return table("block_size", "Thanos over the block size", heads, lines, about)


def _chart(rows_by_label: list[tuple[str, list[Row]]], field: str, name: str, label: str) -> Chart:
    series = []
    for index, (pattern, rows) in enumerate(rows_by_label):
        drawn = points(rows, "block_size", field, Row.noise)
        if drawn:
            name_of, style = (pattern, pattern) if len(rows_by_label) > 1 else ("Thanos", "thanos")
            series.append(Series(name_of, style, drawn, index))
    title = {"perplexity": "Perplexity", "layer_error": "Layer error", "seconds": "Pruning time"}[field]
    return Chart(
        "lines",
        name,
        f"{title} of Thanos over block size, {label}",
        "block size B, columns",
        _CHARTS[field],
        tuple(series),
        x_scale="log2",
        note=(BAR_NOTE,),
    )
