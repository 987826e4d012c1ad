"""Repair and allocation: each setting compared with the method alone."""

from __future__ import annotations

from thanos.study.report.results import Results, Row
from thanos.study.report.sections.common import SPREAD_NOTE, VERDICT_NOTE, Section, compared_with_plain, note
from thanos.study.report.tables import Line, measures, table

_FIELDS = ("perplexity", "kl_divergence", "zero_shot", "seconds")
_HEADS = (
    "<Pattern|pattern; <Method and repair|label; perplexity; kl_divergence; zero_shot; seconds; "
    "perplexity − that of the method alone|difference; <verdict"
)


def repair(results: Results) -> Section:
    """Return the rows with a repair or an allocation, each compared with the same method without them."""
    section = Section("repair", "Repair and allocation")
    rows = results.repaired
    if not rows:
        return section
    section.prose.append(
        (
            "An effort sets the parts of the repair: dense targets, the order of the layers, the refit and the tuning. A part "
            "that is listed with the effort has another value than the effort sets.",
        )
    )
    about = note(
        rows,
        SPREAD_NOTE,
        VERDICT_NOTE,
    )
    section.tables.append(
        table("repair", "Runs with a repair or an allocation", _HEADS, [_line(results, row) for row in rows], about)
    )
    return section


def _line(results: Results, row: Row) -> Line:
    shown, change, sign = compared_with_plain(results, row)
    return (row.pattern_label, row.label, *measures(shown, _FIELDS), change, sign)
