"""What the sections of a report share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from thanos.study.report.figures.charts import Figure, Point
from thanos.study.report.numbers import Number, Prose, count, setting
from thanos.study.report.ranking import comparable, verdict
from thanos.study.report.results import Results, Row, pattern_order, row_of
from thanos.study.report.tables import Table
from thanos.study.store import CellRecord

HEADLINE = ("unstructured", "2:4", "4:8", "columns")
"""The patterns of the headline table, at the sparsity of :func:`headline_sparsity`."""

USUAL_SPARSITY = {"columns": 0.3}
"""The paper's, where it is not 50 %."""

SIGNS = {"better": "<", "worse": ">", "tie": "=", "": "–"}
"""Verdicts on perplexity as a table draws them."""


@dataclass(slots=True)
class Section:
    """One section of a report.

    Attributes:
        name: its anchor.
        title: its heading, a question where it answers one.
        prose: paragraphs.
        tables, figures: what it shows.
        missing: the cells that it would need and the store lacks.
    """

    name: str
    title: str
    prose: list[Prose] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


COST_ONLY: Prose = (
    "This model was pruned and not evaluated (cost_only in the study), as models with random weights are: its numbers tell "
    "what pruning costs, and how far the layers' outputs moved, and nothing about accuracy.",
)
"""Stands above the sections of a model of which the cost alone was measured."""


def headline_sparsity(results: Results, pattern: str) -> float | None:
    """Return the sparsity at which the headline shows a pattern; None if the store has no row of it.

    The paper's if two methods have it; else that of the most methods, then of the most seeds, then nearest to the paper's. A
    cell more or less elsewhere does not move the headline.
    """
    rows = [row for row in results.select(pattern=pattern, alpha=0.0) if row.has_default_block]
    usual = USUAL_SPARSITY.get(pattern, 0.5)
    methods: dict[float, set[str]] = {}
    cells: dict[float, int] = {}
    for row in rows:
        methods.setdefault(row.sparsity, set()).add(row.method)
        cells[row.sparsity] = cells.get(row.sparsity, 0) + len(row.draws)
    return max(
        methods,
        key=lambda at: (
            abs(at - usual) < 1e-9 and len(methods[at]) > 1,
            len(methods[at]),
            cells[at],
            -abs(at - usual),
        ),
        default=None,
    )


def headline_rows(results: Results, pattern: str) -> list[Row]:
    """Return the plain rows of every method at the headline's sparsity of a pattern."""
    sparsity = headline_sparsity(results, pattern)
    if sparsity is None:
        return []
    return [row for row in results.select(pattern=pattern, sparsity=sparsity, alpha=0.0) if row.has_default_block]


def equal_alphas(results: Results, method: str, pattern: str, sparsity: float) -> list[Row]:
    """Return a method's rows over α, from 0 up, whose measured sparsity equals that of α = 0; one row for each α."""
    base = results.find(method=method, pattern=pattern, sparsity=sparsity)
    if base is None:
        return []
    rows = [row for row in results.select(method=method, pattern=pattern, sparsity=sparsity) if row.has_default_block]
    # Where both variants meet the sparsity, as for columns, the one that promises to keep the budget stands for both.
    found = {row.alpha: row for row in sorted(rows, key=lambda row: row.keep_budget) if comparable(row, base)}
    return [found[alpha] for alpha in sorted(found)]


def patterns_of(rows: Iterable[Row]) -> list[str]:
    """Return the patterns of rows in the order in which they are shown."""
    return sorted({row.pattern for row in rows}, key=pattern_order)


def own(row: Row, field: str) -> Number | None:
    """Return a setting of a row, which all of its cells share."""
    return setting(row.records[0], field)


def points(
    rows: Iterable[Row],
    x: str,
    y: str,
    bar: Callable[[Row, str], Number | None] = Row.spread,
    label: Callable[[Row], str] | None = None,
) -> tuple[Point, ...]:
    """Return a point for each row that has both fields; with a label it has the style of its own method too.

    Args:
        rows: in the order of the points.
        x: a setting (``alpha``, ``block_size``), or a field of which the mean is taken.
        y: a field of which the mean is taken.
        bar: of a row and y, the spread that is drawn.
        label: of a row.
    """
    at = own if x in ("alpha", "block_size") else Row.mean
    found = [(row, at(row, x), row.mean(y)) for row in rows]
    return tuple(
        Point(a, b, bar(row, y), label(row) if label else "", style=row.method if label else "")
        for row, a, b in found
        if a is not None and b is not None
    )


def best_by(rows: Sequence[Row], fields: Iterable[str]) -> dict[str, list[Row]]:
    """Return for each field the rows that no row of their sparsity clearly beats; none that has no such row beside it.

    As for :func:`~thanos.study.report.ranking.ranks`, only rows of equal measured sparsity are compared, over common seeds.
    """
    found: dict[str, list[Row]] = {}
    for name in fields:
        able = [row for row in rows if row.mean(name) is not None]
        results = {row: [verdict(o, row, name) for o in able if o is not row and comparable(o, row)] for row in able}
        found[name] = [row for row in able if any(results[row]) and "better" not in results[row]]
    return found


def note(rows: Iterable[Row], *more: str) -> Prose:
    """Return what stands below a table: how many cells, their measured sparsity, and how to read the marks."""
    rows = list(rows)
    records = [record for row in rows for record in row.records]
    if not records:
        return more
    noun = " cell" if len(records) == 1 else " cells"
    measured = sorted((n for row in rows if (n := row.mean("sparsity")) is not None), key=lambda n: n.value)
    parts: list[str | Number] = [count(records), noun]
    if measured and measured[0].text == measured[-1].text:
        parts += ["; measured sparsity ", measured[0], " %"]
    elif measured:
        parts += ["; measured sparsity ", measured[0], " to ", measured[-1], " %"]
    parts.append(".")
    return (*parts, *(f" {text}" for text in more))


def counted(names: Sequence[str], one: str, several: str = "") -> str:
    """Return names as words, and their number: ``SparseGPT, Wanda and magnitude (3 other methods)``."""
    words = " and ".join([*([", ".join(names[:-1])] if names[1:] else []), names[-1]])
    return f"{words} ({len(names)} {one if len(names) == 1 else several or one + 's'})"


def seeds_of(rows: Iterable[Row]) -> str:
    """Return the seeds of rows as words: ``seeds 0, 1, 2``."""
    seeds = sorted(
        {str(record.cell["seed"]) for row in rows for record in row.records}, key=lambda seed: (len(seed), seed)
    )
    return f"seed{'' if len(seeds) == 1 else 's'} {', '.join(seeds)}"


def common_note(rows: Sequence[Row], shared: Sequence[Row]) -> str:
    """Return over which seeds a table's rows are shown, by pattern where these differ, and that some have others besides."""
    more = any(len(part.records) < len(row.records) for row, part in zip(rows, shared, strict=True))
    rest = "; the others of rows with more count for the noise alone" if more else ""
    found = {row.pattern_label: seeds_of([row]) for row in shared}
    if len(set(found.values())) == 1:
        return f"Over {seeds_of(shared)}, which all of these rows have{rest}."
    each = "; ".join(f"{label}: {seeds}" for label, seeds in found.items())
    return f"Over the seeds that all rows of a pattern have ({each}){rest}."


NAMED = 8
"""Settings that are left out and named, for each reason."""


def left_out(results: Results) -> Prose:
    """Return what no comparison shows, and why; nothing where every cell is compared."""
    parts: list[str | Number] = []
    for each in results.left_out:
        names = list(dict.fromkeys(_named(record) for record in each.records))
        parts += ["; " if parts else "Left out: ", count(each.records), " cell" if len(each.records) == 1 else " cells"]
        more = f" and {len(names) - NAMED} more settings" if len(names) > NAMED else ""
        parts.append(f" that {each.reason} ({'; '.join(names[:NAMED])}{more})")
    return (*parts, ".") if parts else ()


def _named(record: CellRecord) -> str:
    row = row_of([record])
    dtype = record.asked.get("dtype")
    return ", ".join(["dense" if row.method == "dense" else row.setting, *([dtype] if dtype else [])])


RANK_NOTE = (
    "Rank: 1 + the number of rows that are better by more than the larger of the two spreads, over the seeds that both have. "
    "= marks a tie. ° one seed only; its spread is taken from the row with the same method, pattern and sparsity, if known."
)
SPREAD_NOTE = (
    "±: sample standard deviation over calibration seeds. ° after a number: one seed, of a row that has several."
)
BAR_NOTE = (
    "Bars: spread over calibration seeds; a row with one seed has that of its method, pattern and sparsity, if known."
)
BEST_NOTE = "Bold: no row of equal measured sparsity is better by more than the spread, over the seeds that both have."
