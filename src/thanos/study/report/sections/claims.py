"""The paper's claims as rules, each evaluated on the store."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from thanos.study.report.numbers import Number, Prose, gain
from thanos.study.report.ranking import change_of, comparable, larger_noise, one_seed, verdict
from thanos.study.report.results import Results, Row, over_common_seeds, percent
from thanos.study.report.sections.common import (
    HEADLINE,
    Section,
    counted,
    equal_alphas,
    headline_rows,
    headline_sparsity,
)
from thanos.study.report.sections.cost import noise_of_seconds, on_device, usual_device
from thanos.study.report.sections.summary import METHODS
from thanos.study.report.tables import Cell, Table, columns, text

_ORDER = ("better", "tie", "worse")
"""Verdicts, from the best for a claim to the worst."""

_WORDS = {"better": "holds", "worse": "does not hold", "tie": "tie", "": "not measured"}


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim, the verdict whether it holds, and the numbers behind the verdict."""

    claim: str
    verdict: str
    evidence: Prose


def claims(results: Results) -> Section:
    """Return the table of the paper's claims on this model."""
    section = Section("claims", "The paper's claims on this model")
    section.prose.append(
        (
            "Each claim is a rule that is evaluated on the store. It is a tie if the difference is within the larger spread "
            "(standard deviation over calibration seeds); otherwise it holds or does not hold. °: from one seed only. A claim "
            "of several parts holds if all parts hold. Only rows of equal measured sparsity are compared, over the seeds that "
            "all rows of the claim have.",
        )
    )
    judged = all_claims(results)
    section.missing += [f"cells for the claim “{c.claim}”" for c in judged if c.verdict == _WORDS[""]]
    judged = [c for c in judged if c.verdict != _WORDS[""]]
    if not judged:
        return section
    lines: list[tuple[Cell, ...]] = [(text(c.claim), text(c.verdict), Cell(prose=c.evidence)) for c in judged]
    cells = {
        key for c in judged for part in c.evidence if isinstance(part, Number) for key in (*part.cells, *part.minus)
    }
    about = (
        Number(len(cells), "cells", "value", tuple(sorted(cells))),
        f" cell{'' if len(cells) == 1 else 's'}; only rows within 0.2 points of measured sparsity are compared.",
    )
    heads = columns("<Claim|claim", "<verdict", "<numbers")
    section.tables.append(Table("claims", "Claims for Thanos", heads, tuple(lines), note=about if cells else ()))
    return section


def all_claims(results: Results) -> list[Claim]:
    """Evaluate every claim."""
    patterns = [pattern for pattern in HEADLINE if headline_rows(results, pattern)]
    judged = [_lowest(results, pattern) for pattern in patterns or ["unstructured"]]
    judged.append(_gap_grows(results))
    judged += [_alpha_helps(results, pattern) for pattern in ("2:4", "4:8", "columns")]
    judged.append(_structured_gain_largest(results))
    judged += [
        _lowest(results, p, "zero_shot")
        for p in patterns
        if any(r.mean("zero_shot") for r in headline_rows(results, p))
    ]
    judged.append(_faster(results))
    return judged


def _lowest(results: Results, pattern: str, field: str = "perplexity") -> Claim:
    rows = headline_rows(results, pattern)
    label = rows[0].pattern_label if rows else f"{pattern} 50 %"
    what = "lower perplexity" if field == "perplexity" else "higher zero-shot average"
    own = next((row for row in rows if row.method == "thanos" and row.mean(field)), None)
    others = [row for row in rows if own and row is not own and row.method in METHODS and comparable(row, own)]
    others = [row for row in others if own and verdict(own, row, field)]
    if own is None or not others:
        return Claim(f"{label}: {what} than another method", _WORDS[""], ())
    claim = f"{label}: {what} than {counted([row.name for row in others], 'other method')}"

    def threat(other: Row) -> tuple[int, float]:
        change = change_of(own, other, field)
        assert change is not None
        return _ORDER.index(verdict(own, other, field)), change.value if field == "perplexity" else -change.value

    rival = max(others, key=threat)
    return Claim(claim, _judged(own, rival, field), _against(own, rival, field))


def _gap_grows(results: Results) -> Claim:
    claim = "unstructured: the gap to SparseGPT grows with sparsity"
    pairs: list[tuple[Row, Row]] = []
    for row in results.select(method="thanos", pattern="unstructured", alpha=0.0):
        other = results.find(method="sparsegpt", pattern="unstructured", sparsity=row.sparsity)
        if row.sparsity < 0.5 - 1e-9 or not row.has_default_block or other is None or not comparable(row, other):
            continue
        if row.mean("perplexity") is not None and other.mean("perplexity") is not None:
            pairs.append((row, other))
    pairs = _shared(pairs)
    gaps = [gap for own, other in pairs if (gap := change_of(other, own)) is not None]
    if len(gaps) < 2:
        return Claim(claim, _WORDS[""], ())
    claim += f", over {counted([percent(own.sparsity) for own, _ in pairs], 'sparsity', 'sparsities')}"
    steps = [
        _beyond(later.value - earlier.value, [_value(larger_noise(*pairs[index], *pairs[index + 1]))])
        for index, (earlier, later) in enumerate(pairwise(gaps))
    ]
    parts: list[str | Number] = []
    for (own, _), gap in zip(pairs, gaps, strict=True):
        parts += [f"{', ' if parts else ''}{100 * own.sparsity:g} %: ", gap]
    mark = one_seed(*(row for pair in pairs for row in pair))
    return Claim(claim, _WORDS[_worst(steps)] + mark, tuple(parts))


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
    claim = "The gain over SparseGPT, as a fraction of the perplexity, is largest for columns"
    pairs: list[tuple[Row, Row]] = []
    for pattern in HEADLINE:
        rows = {row.method: row for row in headline_rows(results, pattern) if row.mean("perplexity")}
        if "thanos" in rows and "sparsegpt" in rows and comparable(rows["thanos"], rows["sparsegpt"]):
            pairs.append((rows["thanos"], rows["sparsegpt"]))
    gains: dict[str, tuple[Number, float]] = {}
    parts: list[str | Number] = []
    for own, other in _shared(pairs):
        first, second = own.mean("perplexity"), other.mean("perplexity")
        if first is not None and second is not None:
            gains[own.pattern] = gain(first, second), _noise_of_gain(own, other)
            parts += [f"{', ' if parts else ''}{own.pattern_label}: ", gains[own.pattern][0]]
    if "columns" not in gains or len(gains) < 2:
        return Claim(claim, _WORDS[""], ())
    most, noise = gains.pop("columns")
    labels = [own.pattern_label for own, _ in pairs if own.pattern in gains]
    claim += f", compared with {counted(labels, 'other pattern')}"
    results_by_pattern = [_beyond(most.value - value.value, [noise, other]) for value, other in gains.values()]
    mark = one_seed(*(row for pair in _shared(pairs) for row in pair))
    return Claim(claim, _WORDS[_worst(results_by_pattern)] + mark, tuple(parts))


def _noise_of_gain(own: Row, other: Row) -> float:
    """Return the noise of the gain 1 − own / other: the larger of each perplexity's noise times the gain's derivative."""
    a, b = own.value("perplexity"), other.value("perplexity")
    return max(_value(own.noise()) / b, _value(other.noise()) * a / b**2)


def _shared(pairs: list[tuple[Row, Row]]) -> list[tuple[Row, Row]]:
    """Return the pairs of rows restricted to the seeds that all rows have."""
    rows = over_common_seeds(*(row for pair in pairs for row in pair))
    return list(zip(rows[::2], rows[1::2], strict=True))


def _beyond(change: float, noises: list[float]) -> str:
    """Return ``tie`` if a change is within the largest noise, else ``better`` if it is positive, ``worse`` if negative."""
    return "tie" if abs(change) <= max(noises) else "better" if change > 0 else "worse"


def _worst(verdicts: list[str]) -> str:
    """Return the verdict on a claim of several parts: the worst of the parts' verdicts."""
    return max(verdicts, key=_ORDER.index)


def _value(number: Number | None) -> float:
    return 0.0 if number is None else number.value


def _faster(results: Results) -> Claim:
    timed = [row for row in headline_rows(results, "columns") if row.mean("seconds")]
    timed = on_device(timed, usual_device(results))
    claim = f"{timed[0].pattern_label if timed else 'columns'}: less time than SparseGPT"
    rows = {row.method: row for row in timed}
    own, other = rows.get("thanos"), rows.get("sparsegpt")
    if own is None or other is None or not verdict(own, other, "seconds"):
        return Claim(claim, _WORDS[""], ())
    return Claim(claim, _judged(own, other, "seconds", noise_of_seconds(results)), _against(own, other, "seconds"))


def _judged(own: Row, other: Row, field: str = "perplexity", lent: Number | None = None) -> str:
    return _WORDS[verdict(own, other, field, lent)] + one_seed(own, other, field=field)


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
