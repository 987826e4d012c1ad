"""The paper's claims as rules, each evaluated on the store."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from thanos.study.report.ranking import comparable, one_seed, verdict
from thanos.study.report.rows import Results, Row, over_common_seeds
from thanos.study.report.sections.common import HEADLINE, Section, equal_alphas, headline_rows, headline_sparsity
from thanos.study.report.tables import Cell, Table, columns, text
from thanos.study.report.values import Number, Prose, difference, gain

_WORDS = {"better": "holds", "worse": "does not hold", "tie": "tie", "": "not measured"}


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim, whether it holds, and the numbers that say so."""

    claim: str
    verdict: str
    evidence: Prose


def claims(results: Results) -> Section:
    """Return the table of the paper's claims on this model."""
    section = Section("claims", "The paper's claims on this model")
    section.prose.append(
        (
            "Each claim is a rule evaluated on the store: it holds or does not where a difference exceeds the larger spread "
            "over seeds, and is a tie within it; ° marks claims of which a row has one seed, its spread being unknown. Only "
            "rows of equal measured sparsity are compared; where they have other seeds, over those that both have.",
        )
    )
    found = all_claims(results)
    lines: list[tuple[Cell, ...]] = [(text(c.claim), text(c.verdict), Cell(prose=c.evidence)) for c in found]
    cells = {
        key for c in found for part in c.evidence if isinstance(part, Number) for key in (*part.cells, *part.minus)
    }
    about = (
        Number(len(cells), "cells", "value", tuple(sorted(cells))),
        " cells; only rows within 0.2 points of measured sparsity are compared.",
    )
    heads = columns("<Claim|claim", "<verdict", "<numbers")
    section.tables.append(Table("claims", "Claims for Thanos", heads, tuple(lines), note=about if cells else ()))
    section.missing += [f"cells for the claim “{c.claim}”" for c in found if c.verdict == _WORDS[""]]
    return section


def all_claims(results: Results) -> list[Claim]:
    """Evaluate every claim."""
    patterns = [pattern for pattern in HEADLINE if headline_rows(results, pattern)]
    found = [_lowest(results, pattern) for pattern in patterns or ["unstructured"]]
    found.append(_gap_grows(results))
    found += [_alpha_helps(results, pattern) for pattern in ("2:4", "4:8", "columns")]
    found.append(_structured_gain_largest(results))
    found += [
        _lowest(results, p, "zero_shot")
        for p in patterns
        if any(r.mean("zero_shot") for r in headline_rows(results, p))
    ]
    found.append(_faster(results))
    return found


def _lowest(results: Results, pattern: str, field: str = "perplexity") -> Claim:
    rows = headline_rows(results, pattern)
    label = rows[0].pattern_label if rows else f"{pattern} 50 %"
    what = "lower perplexity" if field == "perplexity" else "higher zero-shot average"
    claim = f"{label}: {what} than every other method"
    own = next((row for row in rows if row.method == "thanos" and row.mean(field)), None)
    others = [row for row in rows if own and row is not own and row.mean(field) and comparable(row, own)]
    if own is None or not others:
        return Claim(claim, _WORDS[""], ())
    rival = (min if field == "perplexity" else max)(others, key=lambda row: row.value(field))
    return Claim(claim, _judged(own, rival, field), _against(own, rival, field))


def _gap_grows(results: Results) -> Claim:
    claim = "unstructured, 50 % and more: the gap to SparseGPT grows with sparsity"
    gaps: list[tuple[float, Number]] = []
    used: list[Row] = []
    for row in results.select(method="thanos", pattern="unstructured", alpha=0.0):
        other = results.find(method="sparsegpt", pattern="unstructured", sparsity=row.sparsity)
        if row.sparsity < 0.5 - 1e-9 or not row.has_default_block or other is None or not comparable(row, other):
            continue
        own, other = over_common_seeds(row, other)
        a, b = other.mean("perplexity"), own.mean("perplexity")
        if a is not None and b is not None:
            gaps.append((row.sparsity, difference(a, b)))
            used += [own, other]
    if len(gaps) < 2:
        return Claim(claim, _WORDS[""], ())
    values = [gap.value for _, gap in gaps]
    grows = all(later > earlier for earlier, later in pairwise(values))
    parts: list[str | Number] = []
    for sparsity, gap in gaps:
        parts += [f"{', ' if parts else ''}{100 * sparsity:g} %: ", gap]
    return Claim(claim, _WORDS["better" if grows else "worse"] + one_seed(*used), tuple(parts))


def _alpha_helps(results: Results, pattern: str) -> Claim:
    sparsity = headline_sparsity(results, pattern)
    rows = [] if sparsity is None else equal_alphas(results, "thanos", pattern, sparsity)
    label = rows[0].pattern_label if rows else pattern
    claim = f"{label}: lower perplexity with α = 0.1 than with α = 0, at equal sparsity"
    own = next((row for row in rows if abs(row.alpha - 0.1) < 1e-9 and row.mean("perplexity")), None)
    if own is None or rows[0].alpha != 0 or rows[0].mean("perplexity") is None:
        return Claim(claim, _WORDS[""], ())
    if not verdict(own, rows[0]):
        return Claim(claim, _WORDS[""], ())
    return Claim(claim, _judged(own, rows[0]), _against(own, rows[0]))


def _structured_gain_largest(results: Results) -> Claim:
    claim = "The gain over SparseGPT, as a share of perplexity, is largest for columns"
    gains: dict[str, Number] = {}
    labels: dict[str, str] = {}
    for pattern in HEADLINE:
        rows = {row.method: row for row in headline_rows(results, pattern) if row.mean("perplexity")}
        if "thanos" in rows and "sparsegpt" in rows and comparable(rows["thanos"], rows["sparsegpt"]):
            first, second = rows["thanos"].mean("perplexity"), rows["sparsegpt"].mean("perplexity")
            assert first is not None
            assert second is not None
            gains[pattern], labels[pattern] = gain(first, second), rows["thanos"].pattern_label
    if "columns" not in gains or len(gains) < 2:
        return Claim(claim, _WORDS[""], ())
    holds = all(gains["columns"].value > value.value for name, value in gains.items() if name != "columns")
    parts: list[str | Number] = []
    for name, value in gains.items():
        parts += [f"{', ' if parts else ''}{labels[name]}: ", value]
    return Claim(claim, _WORDS["better" if holds else "worse"], tuple(parts))


def _faster(results: Results) -> Claim:
    able = [row for row in headline_rows(results, "columns") if row.mean("seconds")]
    claim = f"{able[0].pattern_label if able else 'columns'}: less time than SparseGPT"
    rows = {row.method: row for row in able}
    own, other = rows.get("thanos"), rows.get("sparsegpt")
    if own is None or other is None or len({r.machine["device"] for row in (own, other) for r in row.records}) > 1:
        return Claim(claim, _WORDS[""], ())
    return Claim(claim, _judged(own, other, "seconds"), _against(own, other, "seconds"))


def _judged(own: Row, other: Row, field: str = "perplexity") -> str:
    return _WORDS[verdict(own, other, field)] + one_seed(own, other, field=field)


def _against(own: Row, other: Row, field: str = "perplexity") -> Prose:
    unit = {"seconds": " s", "zero_shot": " %"}.get(field, "")
    parts: list[str | Number] = []
    for row in over_common_seeds(own, other, field=field):
        value, spread = row.mean(field), row.spread(field)
        assert value is not None
        name = row.name if own.method != other.method else f"α = {row.alpha:g}:"
        parts += [f"{' against ' if parts else ''}{name} ", value]
        parts += [" ± ", spread] if spread is not None else []
        parts += [unit] if unit else []
    return tuple(parts)
