"""The scope of the budget: one for all rows of a layer, or the same for every row."""

from __future__ import annotations

from thanos.study.report.results import Results, Row
from thanos.study.report.sections.common import SPREAD_NOTE, VERDICT_NOTE, Section, compared_with_plain, note
from thanos.study.report.tables import Line, measures, table

_FIELDS = ("sparsity", "layer_error", "perplexity", "kl_divergence")
_HEADS = (
    "<Pattern|pattern; <Method|method; <budget per|scope; sparsity; layer_error; perplexity; kl_divergence; "
    "perplexity − that of the method's own scope|difference; <verdict"
)


def scope(results: Results) -> Section:
    """Return the rows whose scope is not the method's own, each with its counterpart of the method's own scope."""
    section = Section("scope", "The scope of the budget")
    rows = results.scoped
    if not rows:
        return section
    section.prose.append(
        (
            "An unstructured budget may be one for all rows of a layer, which may empty whole rows, or the same for every "
            "row. Each row is compared with that of the method's own scope.",
        )
    )
    about = note(
        rows,
        SPREAD_NOTE,
        VERDICT_NOTE,
    )
    lines = [_line(results, row) for row in rows]
    section.tables.append(table("scope", "Budgets of layers and of rows", _HEADS, lines, about))
    return section


def _line(results: Results, row: Row) -> Line:
    shown, change, sign = compared_with_plain(results, row)
    return (row.pattern_label, row.label, row.scope, *measures(shown, _FIELDS), change, sign)
