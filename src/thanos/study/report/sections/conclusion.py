"""The two sentences at the top of a report: the best row at each sparsity with its cost, and the significance of its lead."""

from __future__ import annotations

from thanos.study.report.numbers import Number, Prose
from thanos.study.report.ranking import comparable, larger_noise, verdict
from thanos.study.report.results import Results, Row, over_common_seeds
from thanos.study.report.sections.common import headline_sparsity
from thanos.study.report.sections.summary import groups_of

_MOST = 6
"""If there are more sparsities than this, the sentences name only those of the headline."""
NOISE = "Noise: the larger of the two rows' standard deviations over calibration seeds."
"""Definition of the noise, which the second sentence of a conclusion may name."""


def conclusion(results: Results) -> Prose:
    """Return the two sentences about one model; empty if no row has a perplexity."""
    best: dict[str, tuple[Row, Row | None]] = {}
    for label, rows in groups_of(results).items():
        known = [row for row in rows if row.mean("perplexity") is not None]
        if known:
            first, second = _best_two(known)
            best[label] = first, second
    if not best:
        return ()
    if len(best) > _MOST:
        usual = {label for label, (row, _) in best.items() if row.sparsity == headline_sparsity(results, row.pattern)}
        best = {label: pair for label, pair in best.items() if label in usual} or best
    return (*_lowest(results, best), *_significance(best))


def _best_two(rows: list[Row]) -> tuple[Row, Row | None]:
    """Return the row with the lowest perplexity at the group's largest sparsity, and the next comparable row."""
    most = max(rows, key=lambda row: row.value("sparsity"))
    alike = [row for row in rows if comparable(row, most)]
    ordered = sorted(alike, key=lambda row: (row.value("perplexity"), row.order))
    others = [row for row in ordered[1:] if over_common_seeds(ordered[0], row)[0].records]
    return ordered[0], others[0] if others else None


def _lowest(results: Results, best: dict[str, tuple[Row, Row | None]]) -> Prose:
    """Return a sentence with the row of the lowest perplexity at each sparsity, its perplexity and its pruning time."""
    by_name: dict[str, list[str]] = {}
    for label, (row, _) in best.items():
        by_name.setdefault(row.label, []).append(label)
    parts: list[str | Number] = []
    for name, labels in by_name.items():
        parts.append(f"{'; ' if parts else 'Lowest perplexity: '}{name} at ")
        for position, label in enumerate(labels):
            row = best[label][0]
            quality, seconds = row.mean("perplexity"), row.mean("seconds")
            assert quality is not None
            parts += [*([", "] if position else []), f"{label} (", quality]
            parts += [] if seconds is None else [", pruned in ", seconds, " s"]
            parts.append(")")
    dense = None if results.dense is None else results.dense.mean("perplexity")
    return (*parts, *(() if dense is None else ("; the dense model has ", dense)), ".")


def _significance(best: dict[str, tuple[Row, Row | None]]) -> Prose:
    """Return where the next row is worse by more than the noise, where it is not, and where the noise is unknown."""
    labels_by_verdict: dict[str, list[str]] = {"beyond": [], "tie": [], "unknown": []}
    for label, (row, other) in best.items():
        if other is None:
            continue
        if larger_noise(row, other) is None:
            labels_by_verdict["unknown"].append(label)
        elif verdict(row, other) == "tie":
            labels_by_verdict["tie"].append(f"{label} ({other.label})")
        else:
            labels_by_verdict["beyond"].append(label)
    if not any(labels_by_verdict.values()):
        return (" No other row of equal sparsity was measured, so there is no difference to judge.",)
    if not labels_by_verdict["beyond"] and not labels_by_verdict["tie"]:
        return (
            " It is unknown whether the differences to the next best row exceed the spread over calibration seeds: each "
            "row has only one seed.",
        )
    parts = [
        *([f"larger than the noise at {_and(labels_by_verdict['beyond'])}"] if labels_by_verdict["beyond"] else []),
        *([f"within the noise at {_and(labels_by_verdict['tie'])}"] if labels_by_verdict["tie"] else []),
        *(
            [f"from one seed, with unknown noise, at {_and(labels_by_verdict['unknown'])}"]
            if labels_by_verdict["unknown"]
            else []
        ),
    ]
    return (f" The difference to the next best row is {'; '.join(parts)}.",)


def _and(names: list[str]) -> str:
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), names[-1]])
