"""Which of the paper's three printings of the structured step is right, on a real layer."""

from __future__ import annotations

from collections.abc import Sequence

from thanos.study.report.numbers import count, field_of, setting
from thanos.study.report.results import Results
from thanos.study.report.sections.common import Section
from thanos.study.report.tables import Cell, Table, columns, number, text
from thanos.study.store import CellRecord

_NAMES = {
    "eq13": ("Eq. 13, Algorithm 2", "W[:,P] · (H⁻¹[P,P])⁻¹ · H⁻¹[P,:]"),
    "least_squares": ("Least squares on the support", "H[P,K] · H[K,K]⁻¹"),
    "none": ("No compensation", ""),
    "eq72": ("Appendix G.4.2, Eq. 72", "W[:,P] · H[P,P]⁻¹ · H[P,:]"),
    "algorithm7": ("Algorithm 7", "W[:,P] · H⁻¹[P,P] · H[P,:]"),
}


_PRINTED = ("eq13", "eq72", "algorithm7")
"""The paper's printings."""

SAME = 0.01
"""Errors that differ by no more than this share are equal."""

_WAYS = (
    "The paper prints the step that compensates removed columns in three ways; each is read literally on the same layer and "
    "the same columns."
)


def formula(results: Results) -> Section:
    """Return the relative errors by way of compensation, for each layer that the store has."""
    section = Section("formula", "Which formula for structured removal?")
    lines: list[tuple[Cell, ...]] = []
    bands: dict[int, str] = {}
    for record in results.formulas:
        found = record.formula
        assert found is not None
        rows, width = found["shape"]
        bands[len(lines)] = (
            f"{found['layer']} ({rows} × {width}), {found['removed']} columns removed, {found['tokens']:,} tokens"
        )
        for name in found["errors"]:
            shown, printed = _NAMES.get(name, (name, ""))
            lines.append((text(shown), text(printed), number(setting(record, f"formula:{name}"))))
    if not lines:
        section.missing.append("a [formula] table that names a layer")
        return section
    section.prose.append((f"{_WAYS} {_finding(results.formulas)}".strip(),))
    label = field_of("formula:none").label
    heads = columns("<Printed as|printed_as", "<read literally|formula", f"{label}|error")
    about = (
        count(results.formulas),
        " cell." if len(results.formulas) == 1 else " cells.",
        " Relative error tr(Δ H Δᵀ) / tr(W H Wᵀ). P: the columns removed, K: those kept.",
    )
    section.tables.append(Table("formula", "Relative layer error by formula", heads, tuple(lines), bands, about))
    return section


def _finding(records: Sequence[CellRecord]) -> str:
    """Say which printings reach the least-squares optimum on every layer; nothing where the optimum is not in the store."""
    errors = [record.formula["errors"] for record in records if record.formula is not None]
    if not all(each.get("least_squares") is not None for each in errors):
        return ""
    names = [name for name in _PRINTED if all(each.get(name) is not None for each in errors)]
    right = [n for n in names if all(abs(e[n] - e["least_squares"]) <= SAME * e["least_squares"] for e in errors)]
    wrong = [_NAMES[name][0] for name in names if name not in right]
    where = "" if len(errors) == 1 else " on every layer"
    if not right:
        return (
            f"None of them equals the least-squares optimum within {100 * SAME:g} %{where}: {_and(wrong)} differ."
            if wrong
            else ""
        )
    found = (
        f"{_and([_NAMES[name][0] for name in right])} equal{'s' if len(right) == 1 else ''} the least-squares optimum"
    )
    found += f" within {100 * SAME:g} %{where}"
    if not wrong:
        return f"{found}."
    return f"Only {found}; {_and(wrong)} {'does' if len(wrong) == 1 else 'do'} not, and so cannot be meant as printed."


def _and(names: Sequence[str]) -> str:
    return " and ".join(names)
