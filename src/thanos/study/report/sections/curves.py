"""Perplexity over sparsity, 10 to 80 %: the paper's Figures 1a and 1b."""

from __future__ import annotations

from thanos.study.report.figures.charts import Chart, Series
from thanos.study.report.results import Results, Row, title_of
from thanos.study.report.sections.common import SPREAD_NOTE, Section, note, own, points
from thanos.study.report.sections.summary import METHODS
from thanos.study.report.tables import Column, Line, Table, number, table

SPARSITIES = {
    "unstructured": tuple(step / 10 for step in range(1, 9)),
    "columns": tuple(step / 10 for step in range(1, 5)),
}
"""Pattern → sparsities of a complete study. Columns end at 40 %: models with fewer columns are unusable."""


_SEEDS = "Each number is the mean over all seeds of its row; numbers without ± have one seed. Rows are not ranked here."


def curves(results: Results) -> Section:
    """Return a figure and a table of perplexity over sparsity, for unstructured and for columns."""
    section = Section("sparsity", "Perplexity over sparsity")
    alpha = False
    for pattern, letter in (("unstructured", "a"), ("columns", "b")):
        lines = lines_of(results, pattern)
        lacking = _missing(lines, pattern)
        if lacking:
            section.missing.append(f"{pattern}: {lacking}")
        if any(len(rows) > 1 for rows in lines.values()):
            alpha = alpha or any(key[1] for key in lines)
            section.figures.append(_chart(results, lines, pattern, letter))
            section.tables.append(_table(lines, pattern, letter))
    words = (
        "As in the paper's Figure 1. Points are at the measured sparsity; points of several methods are shifted a little to "
        "be visible. Lines only connect them."
    )
    words += " Lines with α > 0 have the budget kept." if alpha else ""
    if any(isinstance(figure, Chart) and figure.ceiling is not None for figure in section.figures):
        words += " A point far above the others is drawn above the axes; its number is in the legend."
    section.prose.append((words,))
    return section


def lines_of(results: Results, pattern: str) -> dict[tuple[str, float], list[Row]]:
    """Return (method, α) → rows sorted by sparsity. α > 0 is included only with ``keep_budget`` and two sparsities."""
    by_line: dict[tuple[str, float], dict[float, Row]] = {}
    rows = [
        row for row in results.select(pattern=pattern) if row.has_default_block and row.mean("perplexity") is not None
    ]
    for row in rows:
        # Without keep_budget the measured sparsity of a row with α depends on rounding, so such rows are left out.
        if row.alpha and not row.keep_budget:
            continue
        by_line.setdefault((row.method, row.alpha), {})[row.sparsity] = row
    lines = {key: [row for _, row in sorted(by_sparsity.items())] for key, by_sparsity in by_line.items()}
    return {
        key: line
        for key, line in sorted(lines.items(), key=lambda item: item[1][0].order[3:])
        if key[1] == 0 or len(line) > 1
    }


def _label(method: str, alpha: float, *, mixed: bool) -> str:
    name = title_of(method)
    if alpha:
        return f"{name} α = {alpha:g}, kept"
    return f"{name} α = 0" if mixed and method == "thanos" else name


def _chart(results: Results, rows_of_line: dict[tuple[str, float], list[Row]], pattern: str, letter: str) -> Chart:
    series, mixed = [], any(alpha for _, alpha in rows_of_line)
    variants: dict[str, int] = {}
    for (method, alpha), rows in rows_of_line.items():
        variant = variants[method] = variants.get(method, -1) + 1
        series.append(
            Series(_label(method, alpha, mixed=mixed), method, points(rows, "sparsity", "perplexity"), variant)
        )
    dense = None if results.dense is None else results.dense.mean("perplexity")
    return Chart(
        "lines",
        f"sparsity_{pattern}",
        f"Perplexity over sparsity, {pattern} (Figure 1{letter})",
        "measured sparsity of the pruned layers (%)",
        "perplexity",
        tuple(series),
        None if dense is None else ("dense", dense),
        capped=True,
    )


def _table(rows_of_line: dict[tuple[str, float], list[Row]], pattern: str, letter: str) -> Table:
    mixed = any(alpha for _, alpha in rows_of_line)
    heads = [Column("requested sparsity (%)", "sparsity_asked", is_text=False)]
    heads += [
        Column(_label(*key, mixed=mixed), f"{key[0]}_alpha_{key[1]:g}" if key[1] else key[0]) for key in rows_of_line
    ]
    lines: list[Line] = []
    for sparsity in sorted({row.sparsity for rows in rows_of_line.values() for row in rows}):
        at = [next((row for row in rows if row.sparsity == sparsity), None) for rows in rows_of_line.values()]
        asked = next(own(row, "sparsity_asked") for row in at if row is not None)
        shown = [row and number(row.mean("perplexity"), row.spread("perplexity")) for row in at]
        lines.append((asked, *shown))
    used = [row for rows in rows_of_line.values() for row in rows]
    title = f"Perplexity over sparsity, {pattern} (Figure 1{letter})"
    return table(f"sparsity_{pattern}", title, heads, lines, note(used, SPREAD_NOTE, _SEEDS))


def _missing(rows_of_line: dict[tuple[str, float], list[Row]], pattern: str) -> str:
    lacking = []
    for method in METHODS:
        have = {round(row.sparsity, 6) for row in rows_of_line.get((method, 0.0), [])}
        gaps = [f"{100 * value:g}" for value in SPARSITIES[pattern] if value not in have]
        if gaps:
            lacking.append(f"{title_of(method)} at {', '.join(gaps)} %")
    return "; ".join(lacking)
