"""Functions and texts that several sections of a report use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from thanos.settings import in_words
from thanos.study.report.figures.charts import Figure, Point
from thanos.study.report.numbers import Number, Prose, count, setting
from thanos.study.report.ranking import change_of, comparable, one_seed, verdict
from thanos.study.report.results import Results, Row, over_common_seeds, pattern_order, row_of
from thanos.study.report.tables import Table
from thanos.study.store import CellRecord

HEADLINE = ("unstructured", "2:4", "4:8", "columns")
"""Patterns of the paper, in the order of its tables. :func:`headline_patterns` adds the others of a study."""

USUAL_SPARSITY = {"columns": 0.3}
"""Pattern → the paper's sparsity, a fraction, if it is not 50 %."""

SIGNS = {"better": "<", "worse": ">", "tie": "=", "": "–"}
"""Verdict on perplexity → its sign in tables."""


@dataclass(slots=True)
class Section:
    """One section of a report.

    Attributes:
        name: anchor of the section.
        title: heading, in some sections a question.
        prose: paragraphs.
        tables, figures: tables and figures of the section.
        missing: descriptions of cells that the section needs and the store lacks.
        folded: whether the section is closed in the page until the reader opens it.
    """

    name: str
    title: str
    prose: list[Prose] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    folded: bool = False

    @property
    def empty(self) -> bool:
        """Whether there is no table and no figure. Prose alone does not count, since it only explains these."""
        return not self.tables and not self.figures


COST_ONLY: Prose = (
    "This model was pruned but not evaluated (cost_only in the study), for example because its weights are random. Its "
    "numbers show the cost of pruning and the change of the layers' outputs, and nothing about accuracy.",
)
"""First paragraph about a model that was pruned but not evaluated."""


def headline_patterns(results: Results) -> list[str]:
    """Return the patterns of a study: the paper's in its order, then the others."""
    others = [pattern for pattern in patterns_of(results.rows) if pattern not in HEADLINE]
    return [*HEADLINE, *others]


def headline_sparsity(results: Results, pattern: str) -> float | None:
    """Return the sparsity at which the headline shows a pattern; None if the store has no row of the pattern.

    It is the paper's if at least two methods have rows with it. Otherwise it is the sparsity with the most methods, then with
    the most seeds, then the one nearest to the paper's. So single cells at other sparsities do not change the headline.
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
    """Return each method's row with α = 0 and the default block size, at the headline's sparsity of a pattern."""
    sparsity = headline_sparsity(results, pattern)
    if sparsity is None:
        return []
    return [row for row in results.select(pattern=pattern, sparsity=sparsity, alpha=0.0) if row.has_default_block]


def equal_alphas(results: Results, method: str, pattern: str, sparsity: float) -> list[Row]:
    """Return a method's rows sorted by α, one for each α whose measured sparsity equals that of α = 0."""
    base = results.find(method=method, pattern=pattern, sparsity=sparsity)
    if base is None:
        return []
    rows = [row for row in results.select(method=method, pattern=pattern, sparsity=sparsity) if row.has_default_block]
    # If rows with and without keep_budget both have this sparsity, as for columns, the one with keep_budget is used.
    by_alpha = {row.alpha: row for row in sorted(rows, key=lambda row: row.keep_budget) if comparable(row, base)}
    return [by_alpha[alpha] for alpha in sorted(by_alpha)]


def patterns_of(rows: Iterable[Row]) -> list[str]:
    """Return the patterns of rows in display order."""
    return sorted({row.pattern for row in rows}, key=pattern_order)


def own(row: Row, field: str) -> Number | None:
    """Return a setting of a row; all cells of the row have the same."""
    return setting(row.records[0], field)


def points(
    rows: Iterable[Row],
    x: str,
    y: str,
    bar: Callable[[Row, str], Number | None] = Row.spread,
    label: Callable[[Row], str] | None = None,
) -> tuple[Point, ...]:
    """Return a point for each row that has both fields. With ``label`` each point has its method's style.

    Args:
        rows: rows in the order of the points.
        x: name of a setting (``alpha``, ``block_size``), or of a field; then the mean is used.
        y: name of a field; the mean is used.
        bar: function from a row and ``y`` to the spread that is drawn.
        label: function from a row to its label; None for points without labels.
    """
    at = own if x in ("alpha", "block_size") else Row.mean
    coordinates = [(row, at(row, x), row.mean(y)) for row in rows]
    return tuple(
        Point(a, b, bar(row, y), label(row) if label else "", style=row.method if label else "")
        for row, a, b in coordinates
        if a is not None and b is not None
    )


def best_by(rows: Sequence[Row], fields: Iterable[str]) -> dict[str, list[Row]]:
    """Return for each field the rows that are not worse than any comparable row. Rows without a comparable row are left out.

    The comparison is that of :func:`~thanos.study.report.ranking.ranks`: equal measured sparsity, over common seeds.
    """
    best: dict[str, list[Row]] = {}
    for name in fields:
        known = [row for row in rows if row.mean(name) is not None]
        results = {row: [verdict(o, row, name) for o in known if o is not row and comparable(o, row)] for row in known}
        # An empty verdict means that two rows have no common seed.
        best[name] = [row for row in known if any(results[row]) and "better" not in results[row]]
    return best


def note(rows: Iterable[Row], *more: str) -> Prose:
    """Return the note below a table: the number of cells, their measured sparsity, then ``more``."""
    rows = list(rows)
    records = [record for row in rows for record in row.records]
    if not records:
        return more
    measured = sorted((n for row in rows if (n := row.mean("sparsity")) is not None), key=lambda n: n.value)
    parts: list[str | Number] = [*counted_cells(records)]
    if measured and measured[0].text == measured[-1].text:
        parts += ["; measured sparsity ", measured[0], " %"]
    elif measured:
        parts += ["; measured sparsity ", measured[0], " to ", measured[-1], " %"]
    parts.append(".")
    return (*parts, *(f" {text}" for text in more))


def counted(names: Sequence[str], one: str, several: str = "") -> str:
    """Return names and their number in words: ``SparseGPT, Wanda and magnitude (3 other methods)``."""
    return f"{in_words(names)} ({len(names)} {one if len(names) == 1 else several or one + 's'})"


def seeds_of(rows: Iterable[Row]) -> str:
    """Return the seeds of rows in words: ``seeds 0, 1, 2``."""
    seeds = sorted(
        {str(record.cell["seed"]) for row in rows for record in row.records}, key=lambda seed: (len(seed), seed)
    )
    return f"seed{'' if len(seeds) == 1 else 's'} {', '.join(seeds)}"


def common_note(rows: Sequence[Row], shared: Sequence[Row]) -> str:
    """Return a note with the seeds of a table's rows, by pattern if they differ, and a remark if some rows have more seeds."""
    more = any(len(part.records) < len(row.records) for row, part in zip(rows, shared, strict=True))
    rest = "; further seeds of single rows are used only for the noise" if more else ""
    seeds_by_label = {row.pattern_label: seeds_of([row]) for row in shared}
    if len(set(seeds_by_label.values())) == 1:
        return f"Over {seeds_of(shared)}, which all of these rows have{rest}."
    each = "; ".join(f"{label}: {seeds}" for label, seeds in seeds_by_label.items())
    return f"Over the seeds that all rows of a pattern have ({each}){rest}."


NAMED = 8
"""Number of left-out settings that are named, for each reason."""


def counted_cells(records: Sequence[CellRecord]) -> tuple[Number, str]:
    """Return the number of cells, and the noun for it."""
    return count(records), " cell" if len(records) == 1 else " cells"


def left_out(results: Results) -> Prose:
    """Return a sentence with the left-out cells and the reasons; empty if every cell is compared."""
    parts: list[str | Number] = []
    for each in results.left_out:
        names = list(dict.fromkeys(_named(record) for record in each.records))
        parts += ["; " if parts else "Left out: ", *counted_cells(each.records)]
        more = f" and {len(names) - NAMED} more settings" if len(names) > NAMED else ""
        parts.append(f" that {each.reason} ({'; '.join(names[:NAMED])}{more})")
    return (*parts, ".") if parts else ()


def _named(record: CellRecord) -> str:
    row = row_of([record])
    dtype = record.asked.get("dtype")
    return ", ".join(["dense" if row.method == "dense" else row.setting, *([dtype] if dtype else [])])


RANK_NOTE = (
    "Rank: 1 + the number of rows that are better by more than the larger of the two spreads, over the seeds that both have. "
    "=: a tie. ° after a rank: the row has only one seed; its spread is the largest one of a row with the same method, pattern "
    "and sparsity, if known."
)
SPREAD_NOTE = (
    "±: spread, the sample standard deviation over calibration seeds. ° after a number: from one seed, in a row that has "
    "several."
)
BAR_NOTE = (
    "Bars: spread, the sample standard deviation over calibration seeds. For a row with one seed, it is the largest spread of "
    "another row of the same method, pattern and sparsity, if known."
)
BEST_NOTE = (
    "Bold: no row of equal measured sparsity is better by more than the larger of the two spreads (for accuracies also of the "
    "two standard errors), over the seeds that both have."
)
VERDICT_NOTE = (
    "Verdict: < better than the row it is compared with, > worse, = within the noise (the larger of the two rows' spreads), "
    "– not comparable. It is over the seeds that both rows have; °: only one."
)
FOOTNOTES = (SPREAD_NOTE, BEST_NOTE, RANK_NOTE, VERDICT_NOTE, BAR_NOTE)
"""Notes of several tables and figures. The page shows each once, the tables' files with each table. The first defines the
spread, which the others name."""


def compared_with_plain(results: Results, row: Row) -> tuple[Row, Number | None, str]:
    """Compare a row with the row of the same method, pattern and budget without scope, repair and allocation.

    Returns:
        The row over the seeds that both have, the change of the perplexity, and the sign of the verdict. Without a comparable
        row: the row itself, None and a dash.
    """
    names = ("method", "pattern", "sparsity", "units", "alpha", "keep_budget", "block_size")
    plain = results.find(**{name: getattr(row, name) for name in names})
    change = change_of(row, plain) if plain is not None and comparable(row, plain) else None
    if plain is None or change is None:
        return row, None, "–"
    return over_common_seeds(row, plain)[0], change, SIGNS[verdict(row, plain)] + one_seed(row, plain)
