"""Who may be ranked with whom, and who is better: by measured sparsity, and beyond the noise."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from thanos.study.report.rows import Row
from thanos.study.report.values import Number, field_of

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


def verdict(first: Row, second: Row, field: str = "perplexity", noise: float = 0.0) -> str:
    """Compare two rows by the means of a field: ``better``, ``worse``, or ``tie`` within the larger of their spreads.

    A ``noise`` that is known from elsewhere counts as a spread of theirs. Accuracies have the standard error of their items
    besides; the larger counts. Without any spread (one seed each) the means alone decide. Empty where a row has no such number.
    """
    a, b = first.mean(field), second.mean(field)
    if a is None or b is None:
        return ""
    noises = [number.value for row in (first, second) for number in _noises(row, field) if number is not None]
    if abs(a.value - b.value) <= max([noise, *noises]):
        return "tie"
    return "better" if (a.value > b.value) == field_of(field).higher else "worse"


def one_seed(*rows: Row, field: str = "perplexity") -> str:
    """Return the mark ``°`` where any of the rows has one seed, so that its own spread is unknown."""
    return "°" if any(row.spread(field) is None for row in rows) else ""


def _noises(row: Row, field: str) -> list[Number | None]:
    kind, _, task = field.partition(":")
    error = {"zero_shot": "zero_shot_stderr", "task": f"task_stderr:{task}"}.get(kind)
    return [row.spread(field), *([row.mean(error)] if error else [])]


def ranks(rows: Sequence[Row], field: str = "perplexity") -> list[str]:
    """Rank comparable rows: 1 + the number of rows that are clearly better; ``=`` after it marks a tie, ``°`` one seed.

    Rows without the field, or without another to compare with, get an empty text.
    """
    able = [row for row in rows if row.mean(field) is not None]
    found = []
    for row in rows:
        others = [other for other in able if other is not row and comparable(row, other)]
        if row not in able or not others:
            found.append("")
            continue
        results = [verdict(row, other, field) for other in others]
        mark = "=" if "tie" in results else ""
        found.append(f"{1 + results.count('worse')}{mark}{'' if row.spread(field) else '°'}")
    return found
