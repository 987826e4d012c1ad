"""Ranking: only rows of equal measured sparsity are compared, and only differences larger than the noise count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from thanos.study.report.numbers import Number, difference, field_of
from thanos.study.report.results import Row, over_common_seeds

GROUP_WIDTH = 0.002
"""Largest difference of measured sparsity, a fraction, between rows that are ranked against each other: 0.2 points."""


def groups_by_sparsity(rows: Iterable[Row]) -> list[list[Row]]:
    """Group rows by measured sparsity, ascending. The sparsities of a group differ by at most :data:`GROUP_WIDTH`."""
    groups: list[list[Row]] = []
    measured = [row for row in rows if row.mean("sparsity") is not None]
    for row in sorted(measured, key=lambda row: (row.value("sparsity"), row.order)):
        if groups and row.value("sparsity") - groups[-1][0].value("sparsity") <= GROUP_WIDTH:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [sorted(group, key=lambda row: row.order) for group in groups]


def comparable(first: Row, second: Row) -> bool:
    """Whether two rows may be ranked: their measured sparsities differ by at most :data:`GROUP_WIDTH`."""
    return abs(first.value("sparsity") - second.value("sparsity")) <= GROUP_WIDTH


def verdict(first: Row, second: Row, field: str = "perplexity", lent: Number | None = None) -> str:
    """Compare two rows by the means of a field; return ``better``, ``worse``, or ``tie``.

    The means are over the seeds that both rows have. A difference of at most :func:`larger_noise` is a tie. If no spread is
    known, every difference counts. The result is empty if no common seed has the field in both rows.
    """
    change = change_of(first, second, field)
    if change is None:
        return ""
    noise = larger_noise(first, second, field=field, lent=lent)
    if abs(change.value) <= (0.0 if noise is None else noise.value):
        return "tie"
    return "better" if (change.value > 0) == field_of(field).higher else "worse"


def change_of(first: Row, second: Row, field: str = "perplexity") -> Number | None:
    """Return the mean of the first row minus that of the second, over the seeds that both have; None if there are none."""
    a, b = (row.mean(field) for row in over_common_seeds(first, second, field=field))
    return None if a is None or b is None else difference(a, b)


def larger_noise(*rows: Row, field: str = "perplexity", lent: Number | None = None) -> Number | None:
    """Return the largest :meth:`~thanos.study.report.results.Row.noise` of some rows; None if none is known.

    ``lent`` replaces an unknown noise. For accuracies the standard errors over the tasks' items are included.
    """
    kind, _, task = field.partition(":")
    error = {"zero_shot": "zero_shot_stderr", "task": f"task_stderr:{task}"}.get(kind)
    candidates = [row.noise(field) or lent for row in rows] + [row.mean(error) for row in rows if error]
    return max((number for number in candidates if number is not None), key=lambda number: number.value, default=None)


def one_seed(*rows: Row, field: str = "perplexity") -> str:
    """Return the mark ``°`` if a row has fewer than two distinct samples over the common seeds, else an empty text."""
    return "°" if any(row.spread(field) is None for row in over_common_seeds(*rows, field=field)) else ""


def pareto(rows: Sequence[Row], costs: Callable[[Row, Row], str], field: str = "perplexity") -> list[Row]:
    """Return the Pareto front: the rows that no other row dominates.

    A row dominates another if it is not worse in cost and in the field, and better in one of the two.

    Args:
        rows: rows that are comparable with each other.
        costs: function from two rows to the verdict on their costs, as :func:`verdict` gives.
        field: name of the quality field.
    """

    def dominates(first: Row, second: Row) -> bool:
        results = (costs(first, second), verdict(first, second, field))
        return "better" in results and all(result in ("better", "tie") for result in results)

    return [row for row in rows if not any(dominates(other, row) for other in rows if other is not row)]


def ranks(rows: Sequence[Row], field: str = "perplexity") -> list[str]:
    """Return the ranks of rows as text: 1 + the number of comparable rows that are better.

    ``=`` after it marks a tie, ``°`` a row with one seed. Rows without the field, or without a comparable row, get an empty
    text.
    """
    known = [row for row in rows if row.mean(field) is not None]
    texts = []
    for row in rows:
        others = [other for other in known if other is not row and row in known and comparable(row, other)]
        results = [result for other in others if (result := verdict(row, other, field))]
        if not results:
            texts.append("")
            continue
        mark = "=" if "tie" in results else ""
        texts.append(f"{1 + results.count('worse')}{mark}{'' if row.spread(field) else '°'}")
    return texts
