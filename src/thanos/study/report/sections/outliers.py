"""Outlier rows with the budget kept: the effect of dense rows if more weights are removed from the other rows."""

from __future__ import annotations

from thanos.study.report.ranking import change_of, comparable, one_seed, verdict
from thanos.study.report.results import Results, Row, over_common_seeds
from thanos.study.report.sections.common import SIGNS, SPREAD_NOTE, VERDICT_NOTE, Section, note, own
from thanos.study.report.tables import Line, measures, table

_HEADS = (
    "<Pattern|pattern; <Method|method; alpha; sparsity; perplexity; kl_divergence; "
    "perplexity − that of α = 0|difference; <verdict"
)


def outliers(results: Results) -> Section:
    """Return the rows with α > 0 and ``keep_budget``, each with its counterpart without outlier rows."""
    section = Section("outliers", "Outlier rows with the budget kept")
    section.prose.append(
        (
            "With the budget kept, more weights are removed from the other rows, so that the total stays the same. For "
            "unstructured and columns their sparsity is higher. For n:m, the fraction 2α of the rows with the smallest squared "
            "output norm keeps half of the non-zeros (1:4 in a 2:4 model). Only rows of equal measured sparsity are compared.",
        )
    )
    rows = [row for row in results.rows if row.alpha and row.keep_budget and row.has_default_block]
    if not rows:
        section.missing.append("rows with outlier_rows > 0 and keep_budget = true, to compare with α = 0")
        return section
    lines = [_line(results, row) for row in rows]
    about = note(
        rows,
        SPREAD_NOTE,
        VERDICT_NOTE,
    )
    section.tables.append(table("budget_kept", "Outlier rows at the full sparsity", _HEADS, lines, about))
    return section


def _line(results: Results, row: Row) -> Line:
    base = results.find(method=row.method, pattern=row.pattern, sparsity=row.sparsity)
    change, sign, shown = None, "–", row
    if base is not None and comparable(row, base):
        change = change_of(row, base)
        if change is not None:
            shown = over_common_seeds(row, base)[0]
            sign = SIGNS[verdict(row, base)] + one_seed(row, base)
    measured = measures(shown, ("perplexity", "kl_divergence"))
    return (row.pattern_label, row.name, own(row, "alpha"), row.mean("sparsity"), *measured, change, sign)
