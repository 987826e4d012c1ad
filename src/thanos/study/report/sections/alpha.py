"""How many outlier rows: perplexity and KL divergence over α at equal measured sparsity, and the recommended default."""

from __future__ import annotations

from collections.abc import Sequence

from thanos.study.report.figures.charts import Chart, Series
from thanos.study.report.numbers import Number, Prose
from thanos.study.report.ranking import larger_noise, one_seed, verdict
from thanos.study.report.results import Results, Row, over_common_seeds, percent, title_of
from thanos.study.report.sections.common import (
    BAR_NOTE,
    SPREAD_NOTE,
    Section,
    common_note,
    equal_alphas,
    headline_sparsity,
    note,
    own,
    points,
    seeds_of,
)
from thanos.study.report.tables import Table, measures, table

ALPHAS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
"""Fractions of outlier rows that a complete study of the sensitivity to α contains."""

PATTERNS = ("columns", "2:4")
_FIELDS = ("sparsity", "perplexity", "kl_divergence", "layer_error")


def alpha(results: Results) -> Section:
    """Return tables and figures over α, and the recommended default."""
    section = Section("alpha", "How many outlier rows?")
    section.prose.append(
        (
            "Rule: the recommended α is the smallest one whose perplexity differs from the best by at most the noise, the "
            "larger of the two rows' spreads (standard deviations over calibration seeds). All rows of a pattern are compared "
            "over the seeds that all of them have; °: only one seed.",
        )
    )
    within: dict[str, list[Row]] = {}
    for pattern in PATTERNS:
        sparsity = _sparsity(results, pattern)
        rows = [] if sparsity is None else _evaluated(results, "thanos", pattern, sparsity)
        label = pattern if ":" in pattern else f"{pattern} {percent(sparsity if sparsity is not None else 0.3)}"
        have = {round(row.alpha, 6) for row in rows}
        lacking = [f"{value:g}" for value in ALPHAS if value not in have]
        if lacking:
            section.missing.append(f"Thanos, {label}, α = {', '.join(lacking)} with the budget kept")
        if sparsity is None or len(rows) < 2:
            continue
        shared = over_common_seeds(*rows)
        if not shared[0].records:
            section.missing.append(f"Thanos, {label}: a seed that every α has")
            continue
        within[label], best = recommend(shared)
        section.prose.append(_advice(label, shared, within[label][0], best))
        section.tables.append(_table(label, pattern, rows, shared, within[label][0]))
        section.figures += [_chart(results, field, label, pattern, shared) for field in ("perplexity", "kl_divergence")]
    if len(within) > 1:
        section.prose.append(_common(within))
    return section


def _common(within: dict[str, list[Row]]) -> Prose:
    """Return a sentence about the smallest α that is within the noise of the best for every pattern: a common default."""
    shares = [{round(row.alpha, 6): row for row in rows} for rows in within.values()]
    common = sorted(set.intersection(*(set(each) for each in shares)))
    names = " and ".join(within)
    if not common:
        return (f"No single α is within the noise of the best for {names}: choose by pattern.",)
    number = own(shares[0][common[0]], "alpha")
    mark = "°" if any(one_seed(each[common[0]]) for each in shares) else ""
    assert number is not None
    return (f"One default for {names}: α = ", number, f"{mark}, the smallest within the noise of the best for each.")


def recommend(rows: Sequence[Row], field: str = "perplexity") -> tuple[list[Row], Row]:
    """Return the rows within the noise of the best row, sorted by α, and the best row. The first one is recommended.

    Args:
        rows: rows over the same seeds, each with the field.
        field: name of the field that is compared; lower is better.
    """
    best = min(rows, key=lambda row: row.value(field))
    within = [row for row in rows if verdict(row, best, field) != "worse"]
    return sorted(within, key=lambda row: row.alpha), best


def _sparsity(results: Results, pattern: str) -> float | None:
    """Return the sparsity with the most values of α. Among equals the headline's is preferred."""
    rows = [row for row in results.select(method="thanos", pattern=pattern) if row.has_default_block]
    usual = headline_sparsity(results, pattern)
    sparsities = sorted({row.sparsity for row in rows}, key=lambda value: (value != usual, value))
    return max(sparsities, key=lambda value: len(equal_alphas(results, "thanos", pattern, value)), default=None)


def _evaluated(results: Results, method: str, pattern: str, sparsity: float) -> list[Row]:
    rows = equal_alphas(results, method, pattern, sparsity)
    return [row for row in rows if row.mean("perplexity") is not None]


def _advice(label: str, rows: Sequence[Row], chosen: Row, best: Row) -> Prose:
    numbers = [own(row, "alpha") for row in (chosen, best)]
    means = [row.mean("perplexity") for row in (chosen, best)]
    noise, mark = larger_noise(chosen, best), one_seed(*rows)
    words: list[str | Number | None] = [
        f"{label}: {'from one seed, ' * bool(mark)}recommended α = ",
        numbers[0],
        f"{mark} (perplexity ",
        means[0],
        "); ",
    ]
    words += [f"it is the best of {len(rows)}" if chosen is best else "the best is α = "]
    words += [] if chosen is best else [numbers[1], " (", means[1], f") of {len(rows)}"]
    words += [f", over {seeds_of(rows)}. "]
    if noise is None:
        words += ["No row has several seeds, so the noise is unknown, and the recommendation is from one seed (°)."]
    else:
        words += [
            "Noise: ",
            noise,
            f"{', from other rows with several seeds; α is compared over one seed (°)' * bool(mark)}.",
        ]
    return (*(word for word in words if word is not None), *_by_divergence(rows, chosen))


def _by_divergence(rows: Sequence[Row], chosen: Row) -> Prose:
    """Return a sentence about the α that the same rule recommends by KL divergence."""
    known = [row for row in rows if row.mean("kl_divergence") is not None]
    if len(known) < len(rows):
        return ()
    other = recommend(known, "kl_divergence")[0][0]
    if other is chosen:
        return (" By KL divergence the rule chooses the same.",)
    number, mean = own(other, "alpha"), other.mean("kl_divergence")
    assert number is not None
    assert mean is not None
    return (" By KL divergence the rule chooses α = ", number, " (", mean, " nats/token).")


def _table(label: str, pattern: str, rows: list[Row], shared: Sequence[Row], chosen: Row) -> Table:
    heads = "alpha; sparsity; perplexity; kl_divergence; layer_error; <rule|recommended"
    lines = [
        (own(row, "alpha"), *measures(row, _FIELDS), f"recommended{one_seed(*shared)}" if row is chosen else "")
        for row in shared
    ]
    title = f"Thanos over α at equal sparsity, {label}"
    about = note(shared, common_note(rows, shared), SPREAD_NOTE)
    return table(f"alpha_{file_name(pattern)}", title, heads, lines, about)


def _chart(results: Results, field: str, label: str, pattern: str, shared: Sequence[Row]) -> Chart:
    """Return the lines of Thanos and of the methods with as many α, all over the seeds that Thanos's rows have in common."""
    series, sparsity, seeds = [], shared[0].sparsity, shared[0].seeds_with("perplexity")
    for method in dict.fromkeys(row.method for row in results.select(pattern=pattern, sparsity=sparsity)):
        rows = shared if method == "thanos" else equal_alphas(results, method, pattern, sparsity)
        drawn = points([row.only(seeds) for row in rows if seeds <= row.seeds_with(field)], "alpha", field, Row.noise)
        if len(drawn) > 2 or (method == "thanos" and len(drawn) > 1):
            series.append(Series(title_of(method), method, drawn))
    title = {"perplexity": "Perplexity", "kl_divergence": "KL divergence"}[field]
    name = f"alpha_{file_name(pattern)}_{field}"
    y_label = {"perplexity": "perplexity", "kl_divergence": "KL divergence (nats/token)"}[field]
    return Chart(
        "lines",
        name,
        f"{title} of Thanos over α, {label}",
        "α, fraction of output rows left dense",
        y_label,
        tuple(series),
        note=(BAR_NOTE,),
    )


def file_name(pattern: str) -> str:
    """Return a pattern converted for use in a file's name: ``2_4``."""
    return pattern.replace(":", "_")
