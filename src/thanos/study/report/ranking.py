"""Who may be ranked with whom, and who is better: by measured sparsity, and beyond the noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from thanos.study.report.numbers import Number, difference, field_of
from thanos.study.report.results import Row, over_common_seeds

GROUP_WIDTH = 0.002
"""Rows whose measured sparsities differ by more than 0.2 points are never ranked against each other."""


def groups_by_sparsity(rows: Iterable[Row]) -> list[list[Row]]:
    """Cut rows into groups of measured sparsity no wider than :data:`GROUP_WIDTH`, from the lowest up."""
    groups: list[list[Row]] = []
    measured = [row for row in rows if row.mean("sparsity") is not None]
    for row in sorted(measured, key=lambda row: (row.value("sparsity"), row.order)):
        if groups and row.value("sparsity") - groups[-1][0].value("sparsity") <= GROUP_WIDTH:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [sorted(group, key=lambda row: row.order) for group in groups]


def comparable(first: Row, second: Row) -> bool:
    """Tell whether two rows may be ranked: their measured sparsities are within :data:`GROUP_WIDTH`."""
    return abs(first.value("sparsity") - second.value("sparsity")) <= GROUP_WIDTH


def verdict(first: Row, second: Row, field: str = "perplexity", lent: Number | None = None) -> str:
    """Compare two rows by the means of a field: ``better``, ``worse``, or ``tie`` within :func:`larger_noise`.

    The means are over the seeds that both rows have. Where no spread is known the means alone decide. Empty where the rows have
    no seed with such a number in common.
    """
    change = change_of(first, second, field)
    if change is None:
        return ""
    noise = larger_noise(first, second, field=field, lent=lent)
    if abs(change.value) <= (0.0 if noise is None else noise.value):
        return "tie"
    return "better" if (change.value > 0) == field_of(field).higher else "worse"


def change_of(first: Row, second: Row, field: str = "perplexity") -> Number | None:
    """Return the mean of the first row less that of the second, over the seeds that both have; None if there are none."""
    a, b = (row.mean(field) for row in over_common_seeds(first, second, field=field))
    return None if a is None or b is None else difference(a, b)


def larger_noise(*rows: Row, field: str = "perplexity", lent: Number | None = None) -> Number | None:
    """Return the largest :meth:`~thanos.study.report.results.Row.noise` of some rows; None if none is known.

    What is ``lent`` stands for that of a row of which none is known. Accuracies have the standard error of their items
    besides; the larger counts.
    """
    kind, _, task = field.partition(":")
    error = {"zero_shot": "zero_shot_stderr", "task": f"task_stderr:{task}"}.get(kind)
    found = [row.noise(field) or lent for row in rows] + [row.mean(error) for row in rows if error]
    return max((number for number in found if number is not None), key=lambda number: number.value, default=None)


def one_seed(*rows: Row, field: str = "perplexity") -> str:
    """Return the mark ``°`` where the rows have fewer than two draws in common: what is said of them rests on one."""
    return "°" if any(row.spread(field) is None for row in over_common_seeds(*rows, field=field)) else ""


def pareto(rows: Sequence[Row], costs: Callable[[Row, Row], str], field: str = "perplexity") -> list[Row]:
    """Return the rows that no other beats, which is to be no worse in cost and in a field, and better in one of them.

    Args:
        rows: comparable with each other.
        costs: the verdict on two rows' costs.
        field: what is had for it.
    """

    def beats(first: Row, second: Row) -> bool:
        results = (costs(first, second), verdict(first, second, field))
        return "better" in results and all(result in ("better", "tie") for result in results)

    return [row for row in rows if not any(beats(other, row) for other in rows if other is not row)]


def ranks(rows: Sequence[Row], field: str = "perplexity") -> list[str]:
    """Rank comparable rows: 1 + the number of rows that are clearly better; ``=`` after it marks a tie, ``°`` one seed.

    Rows without the field, or without another to compare with, get an empty text.
    """
    able = [row for row in rows if row.mean(field) is not None]
    found = []
    for row in rows:
        others = [other for other in able if other is not row and row in able and comparable(row, other)]
        results = [result for other in others if (result := verdict(row, other, field))]
        if not results:
            found.append("")
            continue
        mark = "=" if "tie" in results else ""
        found.append(f"{1 + results.count('worse')}{mark}{'' if row.spread(field) else '°'}")
    return found
