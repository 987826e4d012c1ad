"""How many outlier rows: perplexity and KL divergence over α at equal measured sparsity, and the default that follows."""

from __future__ import annotations

from thanos.study.report.charts import Chart, Point, Series
from thanos.study.report.rows import NAMES, Results, Row, percent
from thanos.study.report.sections.common import SPREAD_NOTE, Section, equal_alphas, headline_sparsity, note
from thanos.study.report.tables import Cell, Table, columns, measures, number, text
from thanos.study.report.values import Number, Prose, setting

ALPHAS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
"""The shares that the issue of sensitivity is asked for."""

PATTERNS = ("columns", "2:4")
_FIELDS = ("sparsity", "perplexity", "kl_divergence", "layer_error")


def alpha(results: Results) -> Section:
    """Return tables and figures over α, and the recommended default."""
    section = Section("alpha", "How many outlier rows?")
    section.prose.append(
        (
            "Rule: the recommended α is the smallest whose perplexity is within the noise of the best (the spread over seeds).",
        )
    )
    within: dict[str, list[Row]] = {}
    for pattern in PATTERNS:
        sparsity = _sparsity(results, pattern)
        rows = [] if sparsity is None else equal_alphas(results, "thanos", pattern, sparsity)
        label = pattern if ":" in pattern else f"{pattern} {percent(sparsity if sparsity is not None else 0.3)}"
        have = {round(row.alpha, 6) for row in rows}
        lacking = [f"{value:g}" for value in ALPHAS if value not in have]
        if lacking:
            section.missing.append(f"Thanos, {label}, α = {', '.join(lacking)} with the budget kept")
        if sparsity is None or len(rows) < 2:
            continue
        within[label], noise = recommend(results, rows)
        chosen = within[label][0] if within[label] else None
        section.prose.append(_advice(results, label, rows, chosen, noise))
        section.tables.append(_table(label, pattern, rows, chosen))
        section.figures += [
            _chart(results, field, label, pattern, sparsity) for field in ("perplexity", "kl_divergence")
        ]
    if len(within) > 1:
        section.prose.append(_common(within))
    return section


def _common(within: dict[str, list[Row]]) -> Prose:
    """Say which α is within the noise of the best for every pattern: one default for all."""
    shares = [{round(row.alpha, 6): row for row in rows} for rows in within.values()]
    common = sorted(set.intersection(*(set(each) for each in shares)))
    names = " and ".join(within)
    if not common:
        return (f"No one α is within the noise of the best for {names}: choose by pattern.",)
    number = setting(shares[0][common[0]].records[0], "alpha")
    assert number is not None
    return (f"One default for {names}: α = ", number, ", the smallest within the noise of the best for each.")


def recommend(results: Results, rows: list[Row]) -> tuple[list[Row], Number | None]:
    """Return the rows within the noise of the best perplexity, by α, and that noise; the first is what is recommended."""
    able = [row for row in rows if row.mean("perplexity") is not None]
    if not able:
        return [], None
    best = min(able, key=lambda row: row.value("perplexity"))
    noise = results.noise(best)
    limit = best.value("perplexity") + (0.0 if noise is None else noise.value)
    return sorted((row for row in able if row.value("perplexity") <= limit), key=lambda row: row.alpha), noise


def _sparsity(results: Results, pattern: str) -> float | None:
    """Return the sparsity with the most values of α; the headline's if equal."""
    rows = [row for row in results.select(method="thanos", pattern=pattern) if row.has_default_block]
    usual = headline_sparsity(results, pattern)
    sparsities = sorted({row.sparsity for row in rows}, key=lambda value: (value != usual, value))
    return max(sparsities, key=lambda value: len(equal_alphas(results, "thanos", pattern, value)), default=None)


def _advice(results: Results, label: str, rows: list[Row], chosen: Row | None, noise: Number | None) -> Prose:
    if chosen is None:
        return (f"{label}: no perplexity in the store.",)
    best = min((row for row in rows if row.mean("perplexity")), key=lambda row: row.value("perplexity"))
    numbers = [setting(row.records[0], "alpha") for row in (chosen, best)]
    means = [row.mean("perplexity") for row in (chosen, best)]
    assert all(number is not None for number in (*numbers, *means))
    words: list[str | Number | None] = [f"{label}: recommended α = ", numbers[0], " (perplexity ", means[0], "); "]
    words += ["it is the best. "] if chosen is best else ["the best is α = ", numbers[1], " (", means[1], "). "]
    words += ["No row has several seeds: the noise is unknown."] if noise is None else ["Noise: ", noise, "."]
    return tuple(word for word in words if word is not None)


def _table(label: str, pattern: str, rows: list[Row], chosen: Row | None) -> Table:
    heads = columns(
        "α|alpha",
        "sparsity (%)|sparsity",
        "perplexity",
        "KL (nats/token)|kl_divergence",
        "layer error|layer_error",
        "<|recommended",
    )
    lines: list[tuple[Cell, ...]] = []
    for row in rows:
        mark = "recommended" if row is chosen else ""
        lines.append((number(setting(row.records[0], "alpha")), *measures(row, _FIELDS), text(mark)))
    title = f"Thanos over α at equal sparsity, {label}"
    return Table(f"alpha_{file_name(pattern)}", title, heads, tuple(lines), note=note(rows, SPREAD_NOTE))


def _chart(results: Results, field: str, label: str, pattern: str, sparsity: float) -> Chart:
    series = []
    for method in dict.fromkeys(row.method for row in results.select(pattern=pattern, sparsity=sparsity)):
        points = []
        for row in equal_alphas(results, method, pattern, sparsity):
            x, y = setting(row.records[0], "alpha"), row.mean(field)
            if x is not None and y is not None:
                points.append(Point(x, y, row.spread(field)))
        if len(points) > 2 or (method == "thanos" and len(points) > 1):
            series.append(Series(NAMES.get(method, method), method, tuple(points)))
    title = {"perplexity": "Perplexity", "kl_divergence": "KL divergence"}[field]
    name = f"alpha_{file_name(pattern)}_{field}"
    y_label = {"perplexity": "perplexity", "kl_divergence": "KL divergence (nats/token)"}[field]
    return Chart(
        "lines",
        name,
        f"{title} of Thanos over α, {label}",
        "α, share of output rows left dense",
        y_label,
        tuple(series),
    )


def file_name(pattern: str) -> str:
    """Return a pattern as it may stand in a file's name: ``2_4``."""
    return pattern.replace(":", "_")
