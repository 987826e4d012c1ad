"""Relative error and sparsity by block and kind of layer, and the layers with the largest errors."""

from __future__ import annotations

from thanos.study.report.figures.charts import HeatMap
from thanos.study.report.numbers import Number, Prose, setting
from thanos.study.report.ranking import GROUP_WIDTH
from thanos.study.report.results import Results, Row
from thanos.study.report.sections.alpha import file_name
from thanos.study.report.sections.common import Section, headline_patterns, headline_rows, note
from thanos.study.report.tables import Line, table
from thanos.study.store import CellRecord

WORST = 10
"""Number of layers that are named for each pattern."""

_MAPS = {"error": ("relative error", "Relative error"), "zeros": ("sparsity (%)", "Sparsity")}


def where(results: Results) -> Section:
    """Return heat maps of Thanos at each headline pattern, for the first seed, and the worst layers."""
    section = Section("where", "Errors by layer")
    rows = [
        row
        for pattern in headline_patterns(results)
        for row in headline_rows(results, pattern)
        if row.method == "thanos"
    ]
    rows = [row for row in rows if row.records[0].layers]
    if not rows:
        section.missing.append("a headline cell of Thanos")
        return section
    section.prose.append(
        (
            "Thanos, first seed of each pattern. The relative error is the squared norm of the change of a layer's output, "
            "divided by the squared norm of the output.",
        )
    )
    lines: dict[str, list[Line]] = {}
    even: list[tuple[str, Number, Number]] = []
    for row in rows:
        record = row.records[0]
        for kind in _MAPS:
            heat_map = _map(row, record, kind)
            ends = _ends(heat_map) if heat_map is not None and kind == "zeros" else None
            if ends is not None and ends[1].value - ends[0].value < GROUP_WIDTH:
                even.append((row.pattern_label, *ends))
            elif heat_map is not None:
                section.figures.append(heat_map)
        lines[row.pattern_label] = _worst(record)
    if even:
        section.prose.append(_evenly(even))
    heads = "<Layer|layer; error|error_after; without compensation|error_before; sparsity"
    title = f"The {WORST} layers with the largest errors, by pattern"
    section.tables.append(table("worst_layers", title, heads, lines, note(rows, "First seed of each.")))
    return section


def _map(row: Row, record: CellRecord, kind: str) -> HeatMap | None:
    numbers: dict[tuple[int, str], Number] = {}
    for layer in record.layers:
        value = setting(record, f"{kind}:{layer['name']}")
        key = (layer["block"], layer["name"].rsplit(".", 1)[-1])
        # Several layers of one kind in a block are experts: the map shows the one with the largest value.
        if (
            layer["block"] is not None
            and value is not None
            and (key not in numbers or value.value > numbers[key].value)
        ):
            numbers[key] = value
    if not numbers:
        return None
    kinds = list(dict.fromkeys(name for _, name in numbers))
    blocks = sorted({block for block, _ in numbers})
    label, title = _MAPS[kind]
    return HeatMap(
        f"where_{file_name(row.pattern)}_{'error' if kind == 'error' else 'sparsity'}",
        f"{title} by layer, Thanos, {row.pattern_label}",
        label,
        tuple(kinds),
        tuple(str(block) for block in blocks),
        tuple(tuple(numbers.get((block, name)) for name in kinds) for block in blocks),
    )


def _ends(heat_map: HeatMap) -> tuple[Number, Number]:
    """Return the smallest and the largest number of a map."""
    known = [number for row in heat_map.values for number in row if number is not None]
    return min(known, key=lambda number: number.value), max(known, key=lambda number: number.value)


def _evenly(even: list[tuple[str, Number, Number]]) -> Prose:
    """Return a sentence with the range of the layers' sparsities, if they differ too little for a map."""
    words: list[str | Number] = [f"The layers' measured sparsities differ by less than {100 * GROUP_WIDTH:g} points:"]
    for index, (label, low, high) in enumerate(even):
        words += [f"{';' if index else ''} {label} from ", low, " to ", high, " %"]
    return (*words, ".")


def _worst(record: CellRecord) -> list[Line]:
    known = [layer for layer in record.layers if layer["error_after_compensation"] is not None]
    worst = sorted(known, key=lambda layer: -layer["error_after_compensation"])[:WORST]
    kinds = ("error", "raw_error", "zeros")
    return [(layer["name"], *(setting(record, f"{kind}:{layer['name']}") for kind in kinds)) for layer in worst]
