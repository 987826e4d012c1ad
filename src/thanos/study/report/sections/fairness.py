"""Fair comparisons: rows are grouped by their measured sparsity, not by the requested one."""

from __future__ import annotations

from thanos.study.report.numbers import difference
from thanos.study.report.ranking import GROUP_WIDTH, comparable, groups_by_sparsity, ranks
from thanos.study.report.results import Results, Row, title_of
from thanos.study.report.sections.common import (
    BEST_NOTE,
    RANK_NOTE,
    SPREAD_NOTE,
    Section,
    best_by,
    equal_alphas,
    headline_sparsity,
    left_out,
    note,
    own,
    patterns_of,
)
from thanos.study.report.sections.summary import METHODS
from thanos.study.report.tables import Line, Table, measures, table

_FIELDS = ("perplexity", "kl_divergence", "top1_agreement", "zero_shot")
_ALPHA_HEADS = "alpha; <budget|keep_budget; "
_HEADS = "<Method|method; <rank; {}measured sparsity (%)|sparsity; perplexity; kl_divergence; top1_agreement; zero_shot; <seeds"

_OUTLIERS = (
    " Outlier rows (α > 0) stay dense, which lowers the sparsity of n:m patterns. So there are two comparisons of α: as "
    "requested, with other rows of the lower sparsity; and with the budget kept, at the full sparsity."
)


def fairness(results: Results) -> Section:
    """Return the comparisons by measured sparsity, and the pairs that are not compared."""
    section = Section("fairness", "Which rows are compared")
    points = f"{100 * GROUP_WIDTH:g} points"
    section.prose.append(
        (
            f"Rows are grouped by the measured sparsity of the pruned layers. Rows that differ by more than {points} are not "
            "ranked against each other, since fewer zeros improve any method."
            f"{_OUTLIERS if any(row.alpha for row in results.rows) else ''}",
        )
    )
    if results.left_out:
        section.prose.append(left_out(results))
    groups = groups_by_sparsity(row for row in results.rows if row.has_default_block)
    with_alpha = [rows for group in groups if len(rows := _both_ways(group)) > 1]
    if with_alpha:
        section.tables.append(_table("alpha_both_ways", "α > 0 at equal measured sparsity", with_alpha))
    else:
        section.missing.append("rows with α > 0 and others at their measured sparsity (45 % for 2:4 with α = 0.1)")
    section.missing += _missing(results)
    apart = _apart(results)
    if apart is not None:
        section.tables.append(apart)
    several = [group for group in groups if len(group) > 1]
    if several:
        section.tables.append(_table("sparsity_groups", "All groups of equal measured sparsity", several, folded=True))
    return section


def _both_ways(group: list[Row]) -> list[Row]:
    """Return the rows of a group with α = 0 or the paper's 0.1, if an n:m row has α > 0; columns have their own section."""
    rows = [row for row in group if row.pattern != "columns" and row.alpha in (0.0, 0.1)]
    return rows if any(row.alpha and ":" in row.pattern for row in rows) else []


def _table(name: str, title: str, groups: list[list[Row]], *, folded: bool = False) -> Table:
    lines: dict[str, list[Line]] = {}
    with_alpha = any(row.alpha for group in groups for row in group)
    for group in groups:
        shares = [row.value("sparsity") for row in group]
        low, high = f"{100 * min(shares):.1f}", f"{100 * max(shares):.1f}"
        span = low if low == high else f"{low}–{high}"
        for pattern in patterns_of(group):
            rows = [row for row in group if row.pattern == pattern]
            best, ranked = best_by(rows, _FIELDS), zip(rows, ranks(rows), strict=True)
            lines[f"{span} % measured, {pattern}"] = [_line(row, rank, best, with_alpha) for row, rank in ranked]
    rows = [row for group in groups for row in group]
    about = note(rows, SPREAD_NOTE, "Ranked within one pattern.", BEST_NOTE, RANK_NOTE)
    return table(name, title, _HEADS.format(_ALPHA_HEADS if with_alpha else ""), lines, about, folded=folded)


def _line(row: Row, rank: str, best: dict[str, list[Row]], with_alpha: bool) -> Line:
    budget = "" if not row.alpha else "kept" if row.keep_budget else "as requested"
    alpha = (own(row, "alpha"), budget) if with_alpha else ()
    cells = measures(row, ("sparsity", *_FIELDS), best)
    seeds = ", ".join(str(record.cell["seed"]) for record in row.records)
    return (row.name, rank, *alpha, *cells, seeds)


def _apart(results: Results) -> Table | None:
    """Return a table of pairs that are not ranked: α > 0 against α = 0 of the same request, with another sparsity."""
    lines, used = [], []
    for row in results.rows:
        if not row.alpha or not row.has_default_block:
            continue
        base = results.find(method=row.method, pattern=row.pattern, sparsity=row.sparsity)
        if base is None or comparable(row, base):
            continue
        first, second = row.mean("sparsity"), base.mean("sparsity")
        assert first is not None
        assert second is not None
        lines.append((row.setting, first, base.setting, second, difference(first, second)))
        used += [row, base]
    if not lines:
        return None
    heads = "<Row|row; sparsity; <not ranked against|other; sparsity (%)|other_sparsity; points apart|difference"
    title = "Not ranked: same requested sparsity, another measured sparsity"
    return table("not_ranked", title, heads, lines, note(dict.fromkeys(used)), folded=len(lines) > 8)


def _missing(results: Results) -> list[str]:
    """Return the missing cells: α at the full sparsity for n:m patterns, and the other methods if one has α = 0.1."""
    missing = []
    for pattern in patterns_of(results.rows):
        sparsity = headline_sparsity(results, pattern)
        if sparsity is None:
            continue
        if ":" in pattern and len(equal_alphas(results, "thanos", pattern, sparsity)) < 2:
            missing.append(f"Thanos, {pattern}, α = 0.1, budget kept, to compare with α = 0")
        rows = results.select(pattern=pattern, alpha=0.1, sparsity=sparsity)
        for kept in (True, False):
            have = {row.method for row in rows if row.keep_budget == kept}
            lacking = [title_of(method) for method in METHODS if method not in have]
            if have and lacking:
                how = "budget kept" if kept else "as requested"
                missing.append(f"{', '.join(lacking)}, {rows[0].pattern_label}, α = 0.1, {how}")
    return missing
