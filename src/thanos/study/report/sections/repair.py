"""Repair and allocation: each setting beside the method alone."""

from __future__ import annotations

from thanos.study.report.ranking import change_of, comparable, one_seed, verdict
from thanos.study.report.results import Results, Row, over_common_seeds
from thanos.study.report.sections.common import SIGNS, SPREAD_NOTE, Section, note
from thanos.study.report.tables import Line, measures, table

_FIELDS = ("perplexity", "kl_divergence", "zero_shot", "seconds")
_HEADS = (
    "<Pattern|pattern; <Method and repair|label; perplexity; kl_divergence; zero_shot; seconds; "
    "perplexity − that of the method alone|difference; <verdict"
)


def repair(results: Results) -> Section:
    """Return the rows with a repair or an allocation, each compared with the same method without."""
    section = Section("repair", "Repair and allocation")
    rows = results.repaired
    if not rows:
        return section
    section.prose.append(
        (
            "An effort sets the parts of the repair: dense targets, the order of the data, the refit and the tuning. A part "
            "that is named beside the effort differs from what the effort says.",
        )
    )
    about = note(
        rows,
        SPREAD_NOTE,
        "< better than the method alone, > worse, = a difference within the noise, – not comparable; over the seeds that both "
        "have, ° only one.",
    )
    section.tables.append(
        table("repair", "Runs with a repair or an allocation", _HEADS, [_line(results, row) for row in rows], about)
    )
    return section


def _line(results: Results, row: Row) -> Line:
    names = ("method", "pattern", "sparsity", "alpha", "keep_budget", "block_size")
    alone = results.find(**{name: getattr(row, name) for name in names})
    change, sign, shown = None, "–", row
    if alone is not None and comparable(row, alone):
        change = change_of(row, alone)
        if change is not None:
            shown = over_common_seeds(row, alone)[0]
            sign = SIGNS[verdict(row, alone)] + one_seed(row, alone)
    return (row.pattern_label, row.label, *measures(shown, _FIELDS), change, sign)
