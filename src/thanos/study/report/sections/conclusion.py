"""The two sentences at the top of a report: the best row at each sparsity with its cost, and the significance of its lead."""

from __future__ import annotations

from thanos.settings import in_words
from thanos.study.report.numbers import Number, Prose
from thanos.study.report.ranking import comparable, larger_noise, verdict
from thanos.study.report.results import Results, Row, over_common_seeds
from thanos.study.report.sections.common import headline_sparsity
from thanos.study.report.sections.cost import costs_by_pattern, noise_of_seconds
from thanos.study.report.sections.summary import groups_of

_MOST = 6
"""If there are more sparsities than this, the sentences name only those of the headline."""
NOISE = "Noise: the larger of the two rows' standard deviations over calibration seeds."
"""Definition of the noise, which the second sentence of a conclusion may name."""


def conclusion(results: Results) -> Prose:
    """Return the two sentences about one model; empty if there is nothing to compare.

    They are about the perplexity, or about the pruning time of a model that was not evaluated.
    """
    field = "seconds" if results.cost_only else "perplexity"
    groups = costs_by_pattern(results) if results.cost_only else groups_of(results)
    best: dict[str, tuple[Row, Row | None]] = {}
    for label, rows in groups.items():
        known = [row for row in rows if row.mean(field) is not None]
        if known:
            best[label] = _best_two(known, field)
    if not best:
        return ()
    if len(best) > _MOST:
        usual = {label for label, (row, _) in best.items() if row.sparsity == headline_sparsity(results, row.pattern)}
        best = {label: pair for label, pair in best.items() if label in usual} or best
    lent = noise_of_seconds(results) if results.cost_only else None
    return (*_lowest(results, best, field), *_significance(best, field, lent))


def _best_two(rows: list[Row], field: str) -> tuple[Row, Row | None]:
    """Return the row with the lowest value of a field at the group's largest sparsity, and the next comparable row."""
    most = max(rows, key=lambda row: row.value("sparsity"))
    alike = [row for row in rows if comparable(row, most)]
    ordered = sorted(alike, key=lambda row: (row.value(field), row.order))
    others = [row for row in ordered[1:] if over_common_seeds(ordered[0], row, field=field)[0].records]
    return ordered[0], others[0] if others else None


def _lowest(results: Results, best: dict[str, tuple[Row, Row | None]], field: str) -> Prose:
    """Return a sentence with the row of the lowest value at each sparsity, the value, and its pruning time."""
    timed = field == "seconds"
    start = "Shortest pruning time (the model was not evaluated): " if timed else "Lowest perplexity: "
    by_name: dict[str, list[str]] = {}
    for label, (row, _) in best.items():
        by_name.setdefault(row.label, []).append(label)
    parts: list[str | Number] = []
    for name, labels in by_name.items():
        parts.append(f"{'; ' if parts else start}{name} at ")
        for position, label in enumerate(labels):
            row = best[label][0]
            value, seconds = row.mean(field), row.mean("seconds")
            assert value is not None
            parts += [*([", "] if position else []), f"{label} (", value]
            parts += [" s"] if timed else [] if seconds is None else [", pruned in ", seconds, " s"]
            parts.append(")")
    dense = None if results.dense is None else results.dense.mean(field)
    return (*parts, *(() if dense is None else ("; the dense model has ", dense)), ".")


def _significance(best: dict[str, tuple[Row, Row | None]], field: str, lent: Number | None) -> Prose:
    """Return where the next row is worse by more than the noise, where it is not, and where the noise is unknown."""
    labels_by_verdict: dict[str, list[str]] = {"beyond": [], "tie": [], "unknown": []}
    for label, (row, other) in best.items():
        if other is None:
            continue
        if larger_noise(row, other, field=field, lent=lent) is None:
            labels_by_verdict["unknown"].append(label)
        elif verdict(row, other, field, lent) == "tie":
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
        *([f"larger than the noise at {in_words(labels_by_verdict['beyond'])}"] if labels_by_verdict["beyond"] else []),
        *([f"within the noise at {in_words(labels_by_verdict['tie'])}"] if labels_by_verdict["tie"] else []),
        *(
            [f"from one seed, with unknown noise, at {in_words(labels_by_verdict['unknown'])}"]
            if labels_by_verdict["unknown"]
            else []
        ),
    ]
    return (f" The difference to the next best row is {'; '.join(parts)}.",)
