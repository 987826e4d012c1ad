"""Which of the paper's three printings of the structured step is right, on a real layer."""

from __future__ import annotations

from thanos.study.report.rows import Results
from thanos.study.report.sections.common import Section
from thanos.study.report.tables import Cell, Table, columns, number, text
from thanos.study.report.values import count, field_of, setting

_NAMES = {
    "eq13": ("Eq. 13, Algorithm 2", "W[:,P] · (H⁻¹[P,P])⁻¹ · H⁻¹[P,:]"),
    "least_squares": ("Least squares on the support", "H[P,K] · H[K,K]⁻¹"),
    "none": ("No compensation", ""),
    "eq72": ("Appendix G.4.2, Eq. 72", "W[:,P] · H[P,P]⁻¹ · H[P,:]"),
    "algorithm7": ("Algorithm 7", "W[:,P] · H⁻¹[P,P] · H[P,:]"),
}


def formula(results: Results) -> Section:
    """Return the relative errors by way of compensation, for each layer that the store has."""
    section = Section("formula", "Which formula for structured removal?")
    section.prose.append(
        (
            "The paper prints the step that compensates removed columns in three ways. Read literally on the same layer and "
            "the same columns, only the first equals the least-squares optimum; the other two are misprints.",
        )
    )
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
        section.prose = []
        section.missing.append("a [formula] table that names a layer")
        return section
    label = field_of("formula:none").label
    heads = columns("<Printed as|printed_as", "<read literally|formula", f"{label}|error")
    about = (
        count(results.formulas),
        " cell." if len(results.formulas) == 1 else " cells.",
        " Relative error tr(Δ H Δᵀ) / tr(W H Wᵀ). P: the columns removed, K: those kept.",
    )
    section.tables.append(Table("formula", "Relative layer error by formula", heads, tuple(lines), bands, about))
    return section
