"""Block size: what the block-wise formulation costs and brings, and where."""

from __future__ import annotations

from thanos.study.report.charts import Chart, Point, Series
from thanos.study.report.ranking import comparable, one_seed, verdict
from thanos.study.report.rows import Results, Row
from thanos.study.report.sections.alpha import file_name
from thanos.study.report.sections.common import COST_ONLY, SIGNS, SPREAD_NOTE, Section, note
from thanos.study.report.tables import Cell, Table, columns, measures, number, text
from thanos.study.report.values import Number, Prose, difference, setting

SIZES = tuple(2**power for power in range(3, 12))
PATTERNS = ("unstructured", "4:8", "2:4")
_FIELDS = ("layer_error", "perplexity", "kl_divergence", "seconds", "solve_seconds")
_COST_FIELDS = ("layer_error", "seconds", "solve_seconds")
_RULE: Prose = (
    "Rule: it is worth it where some smaller block has a lower perplexity than the largest one measured, by more than the "
    "noise; a tie is decided by the seconds.",
)
_CHARTS = {"perplexity": "perplexity", "layer_error": "mean relative layer error", "seconds": "pruning (s)"}


def blocks(results: Results) -> Section:
    """Return tables and figures over the block size, and a verdict for each pattern."""
    section = Section("blocks", "Is the block-wise formulation worth it, and where?")
    if results.cost_only:
        section = Section("blocks", "What does the block size cost?", prose=[COST_ONLY])
    else:
        section.prose.append(_RULE)
    found: dict[str, list[Row]] = {}
    for pattern in PATTERNS:
        rows = sizes(results, pattern)
        label = rows[0].pattern_label if rows else pattern if ":" in pattern else f"{pattern} 50 %"
        have = {row.block_size for row in rows}
        lacking = [str(size) for size in SIZES if size not in have]
        if lacking:
            section.missing.append(f"Thanos, {label}, B = {', '.join(lacking)}")
        if len(rows) > 1:
            found[label] = rows
            section.prose.append(_costs(label, rows) if results.cost_only else _answer(results, label, rows))
            section.figures += [
                _chart([(label, rows)], field, f"blocks_{file_name(pattern)}_{field}", label)
                for field in ("perplexity", "layer_error")
            ]
    if found:
        section.tables.append(_cost_table(found) if results.cost_only else _table(results, found))
        section.figures.append(_chart(list(found.items()), "seconds", "blocks_seconds", "all patterns"))
    section.figures = [figure for figure in section.figures if isinstance(figure, Chart) and figure.series]
    return section


def sizes(results: Results, pattern: str) -> list[Row]:
    """Return Thanos's rows over B, α = 0, at the sparsity with the most block sizes and equal measured sparsity."""
    rows = [row for row in results.select(method="thanos", pattern=pattern, alpha=0.0) if row.block_size is not None]
    if not rows:
        return []
    counts = {sparsity: sum(row.sparsity == sparsity for row in rows) for sparsity in {row.sparsity for row in rows}}
    usual = max(counts, key=lambda sparsity: (counts[sparsity], -abs(sparsity - 0.5)))
    chosen = sorted((row for row in rows if row.sparsity == usual), key=lambda row: row.block_size or 0)
    return [row for row in chosen if comparable(row, chosen[-1])]


def _answer(results: Results, label: str, rows: list[Row]) -> Prose:
    able = [row for row in rows if row.mean("perplexity") is not None]
    if len(able) < 2:
        return (f"{label}: perplexity was not measured; see layer error and time.",)
    whole, best = able[-1], min(able[:-1], key=lambda row: row.value("perplexity"))
    a, b = best.mean("perplexity"), whole.mean("perplexity")
    s, t = best.mean("seconds"), whole.mean("seconds")
    noise = results.noise(best)
    assert a is not None
    assert b is not None
    change = difference(a, b)
    outside = abs(change.value) > (0.0 if noise is None else noise.value)
    word = "worth it" if change.value < 0 else "not worth it"
    if not outside:
        saves = s is not None and t is not None and s.value < t.value
        word = f"a tie, which time decides {'for' if saves else 'against'} blocks"
    words: list[str | Number | None] = [f"{label}: {word}. B = ", setting(best.records[0], "block_size"), " against "]
    words += [setting(whole.records[0], "block_size"), ": perplexity ", a, " against ", b, " (", change, ")"]
    words += [", pruning ", s, " s against ", t, " s"] if s is not None and t is not None else []
    words += ["; noise unknown (one seed)."] if noise is None else ["; noise ", noise, "."]
    return tuple(word for word in words if word is not None)


def _costs(label: str, rows: list[Row]) -> Prose:
    able = [row for row in rows if row.mean("seconds") is not None]
    if not able:
        return (f"{label}: time was not measured.",)
    least = min(able, key=lambda row: row.value("seconds"))
    words: list[str | Number | None] = [
        f"{label}: pruning takes least with B = ",
        setting(least.records[0], "block_size"),
    ]
    words += [", ", least.mean("seconds"), " s"]
    for row in (able[0], able[-1]):
        if row is not least:
            words += ["; B = ", setting(row.records[0], "block_size"), ": ", row.mean("seconds"), " s"]
    return tuple(word for word in (*words, ".") if word is not None)


def _cost_table(found: dict[str, list[Row]]) -> Table:
    heads = columns(
        "B|block_size",
        "layer error|layer_error",
        "pruning (s)|seconds",
        "of it solving (s)|solve_seconds",
        "sparsity (%)|sparsity",
    )
    lines: list[tuple[Cell, ...]] = []
    bands: dict[int, str] = {}
    for label, rows in found.items():
        bands[len(lines)] = label
        for row in rows:
            size = number(setting(row.records[0], "block_size"))
            lines.append((size, *measures(row, _COST_FIELDS), number(row.mean("sparsity"))))
    about = note([row for rows in found.values() for row in rows])
    return Table("block_size", "Thanos over the block size", heads, tuple(lines), bands, about)


def _table(results: Results, found: dict[str, list[Row]]) -> Table:
    heads = columns(
        "B|block_size",
        "layer error|layer_error",
        "perplexity",
        "KL (nats/token)|kl_divergence",
        "pruning (s)|seconds",
        "of it solving (s)|solve_seconds",
        "sparsity (%)|sparsity",
        "<against the largest B|verdict",
    )
    lines: list[tuple[Cell, ...]] = []
    bands: dict[int, str] = {}
    for label, rows in found.items():
        bands[len(lines)] = label
        for row in rows:
            noise = results.known_noise(row, rows[-1])
            sign = "" if row is rows[-1] else SIGNS[verdict(row, rows[-1], noise=noise)]
            size = number(setting(row.records[0], "block_size"))
            lines.append((size, *measures(row, _FIELDS), number(row.mean("sparsity")), text(sign + one_seed(row))))
    used = [row for rows in found.values() for row in rows]
    about = note(
        used,
        SPREAD_NOTE,
        "< lower perplexity than the largest B, > higher, = within the noise: the larger spread, of the same pattern with "
        "another B where a row has one seed (°).",
    )
    return Table("block_size", "Thanos over the block size", heads, tuple(lines), bands, about)


def _chart(found: list[tuple[str, list[Row]]], field: str, name: str, label: str) -> Chart:
    series = []
    for place, (pattern, rows) in enumerate(found):
        points = []
        for row in rows:
            x, y = setting(row.records[0], "block_size"), row.mean(field)
            if x is not None and y is not None:
                points.append(Point(x, y, row.spread(field)))
        if points:
            several = len(found) > 1
            series.append(
                Series(pattern if several else "Thanos", pattern if several else "thanos", tuple(points), place)
            )
    title = {"perplexity": "Perplexity", "layer_error": "Layer error", "seconds": "Pruning time"}[field]
    return Chart(
        "lines",
        name,
        f"{title} of Thanos over block size, {label}",
        "block size B, columns",
        _CHARTS[field],
        tuple(series),
        x_scale="log2",
    )
