"""Numbers of a report. Each has the keys of its cells in the store, and the operation that computed it from them.

A report prints no other numbers. ``how`` names the operation on one field of the cells:

- ``value``: the field of the first cell (a setting), or the number of cells for the field ``cells``;
- ``mean``, ``spread``: mean and sample standard deviation over the cells, which differ in their seed;
- ``difference``: mean over ``cells`` minus mean over ``minus``;
- ``gain``: (mean over ``minus`` − mean over ``cells``) / mean over ``minus``;
- ``price``: additional seconds of ``cells`` over ``minus``, for each point by which their field is lower.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from thanos.study.store import CellRecord

KEY_DIGITS = 12
"""Number of hexadecimal digits of a cell's short key: 48 bits, so collisions within a store are unlikely."""


@dataclass(frozen=True, slots=True)
class Field:
    """One quantity of a record.

    Attributes:
        read: function from a record to the value; None if the record has none.
        label: label in tables and on axes, with the unit.
        show: function from a value in the label's unit to its text.
        scale: factor from the store's unit to the label's unit.
        higher: whether a larger value is better.
    """

    read: Callable[[CellRecord], float | None]
    label: str
    show: Callable[[float], str]
    scale: float = 1.0
    higher: bool = False


@dataclass(frozen=True, slots=True)
class Number:
    """A number and its origin.

    Attributes:
        value: unrounded value in the store's unit; for ``gain`` a fraction, for ``price`` seconds per point.
        field: name of the field, see :func:`field_of`.
        how: operation, see the module's docstring.
        cells: short keys of the cells.
        minus: short keys of the cells that are subtracted.
    """

    value: float
    field: str
    how: str
    cells: tuple[str, ...]
    minus: tuple[str, ...] = ()

    @property
    def scaled(self) -> float:
        """The value in the unit of the field's label."""
        return self.value * field_of(self.field).scale

    @property
    def text(self) -> str:
        """The value as a table shows it, in the unit of the field's label."""
        if self.how == "gain":
            return f"{100 * self.value:.1f} %".replace("-", "−")
        if self.how == "price":
            return _two_significant(self.value).replace("-", "−")
        text = field_of(self.field).show(self.scaled)
        return f"+{text}" if self.how == "difference" and self.value > 0 else text.replace("-", "−")

    def to_dict(self) -> dict[str, Any]:
        """Return the number as plain values for JSON."""
        values: dict[str, Any] = {"value": self.value, "field": self.field, "how": self.how, "cells": list(self.cells)}
        return {**values, "minus": list(self.minus)} if self.minus else values


Prose = tuple[str | Number, ...]
"""One or more sentences: a sequence of texts and numbers."""


def plain(prose: Prose) -> str:
    """Return prose as text."""
    return "".join(part if isinstance(part, str) else part.text for part in prose)


def short(record: CellRecord) -> str:
    """Return the short key of a cell: the first :data:`KEY_DIGITS` digits."""
    return record.key[:KEY_DIGITS]


def setting(record: CellRecord, field: str) -> Number | None:
    """Return a field of one cell; None if the cell has none."""
    value = field_of(field).read(record)
    return None if value is None else Number(value, field, "value", (short(record),))


def count(records: Sequence[CellRecord]) -> Number:
    """Return the number of cells."""
    return Number(len(records), "cells", "value", tuple(short(record) for record in records))


def mean(records: Sequence[CellRecord], field: str) -> Number | None:
    """Return the mean of a field over the cells that have it; None if no cell has it."""
    values = _values(records, field)
    return Number(statistics.fmean(values.values()), field, "mean", tuple(values)) if values else None


def spread(records: Sequence[CellRecord], field: str) -> Number | None:
    """Return the sample standard deviation of a field; None for fewer than two cells that have it."""
    values = _values(records, field)
    return Number(statistics.stdev(values.values()), field, "spread", tuple(values)) if len(values) > 1 else None


def difference(first: Number, second: Number) -> Number:
    """Return first − second, both means of one field."""
    assert first.field == second.field
    return Number(first.value - second.value, first.field, "difference", first.cells, second.cells)


def gain(first: Number, second: Number) -> Number:
    """Return (second − first) / second, a fraction; both are means of one field."""
    assert first.field == second.field
    return Number((second.value - first.value) / second.value, first.field, "gain", first.cells, second.cells)


def price(seconds: tuple[Number, Number], quality: tuple[Number, Number]) -> Number | None:
    """Return the price of quality: the additional seconds of the first row, divided by the difference in quality.

    Args:
        seconds: seconds of the first and the second row.
        quality: values of which lower is better, such as perplexities, of both rows.

    Returns:
        The price; None if the first row is not better.
    """
    better = quality[1].value - quality[0].value
    if better <= 0:
        return None
    value = (seconds[0].value - seconds[1].value) / better
    return Number(value, quality[0].field, "price", quality[0].cells, quality[1].cells)


def _values(records: Sequence[CellRecord], field: str) -> dict[str, float]:
    read = field_of(field).read
    by_cell = {short(record): read(record) for record in records}
    return {key: value for key, value in by_cell.items() if value is not None}


def field_of(name: str) -> Field:
    """Return a quantity by name.

    In addition to :data:`FIELDS` there are ``task:NAME`` and ``task_stderr:NAME`` (accuracy on one task), and ``error:LAYER``,
    ``raw_error:LAYER`` and ``zeros:LAYER`` (relative error after and before compensation, and sparsity, of one layer).
    """
    kind, _, rest = name.partition(":")
    if not rest:
        return FIELDS[name]
    if kind in ("task", "task_stderr"):
        key = "acc" if kind == "task" else "acc_stderr"
        return Field(lambda r: _dig(r.zero_shot, "tasks", rest, key), f"{rest} (%)", _one, 100, higher=True)
    key = {"error": "error_after_compensation", "raw_error": "error_before_compensation", "zeros": "sparsity"}[kind]
    if kind == "zeros":
        return Field(lambda r: _layer(r, rest, key), "sparsity (%)", _two, 100)
    return Field(lambda r: _layer(r, rest, key), "relative error", _significant)


def _layer(record: CellRecord, name: str, key: str) -> float | None:
    return next((layer[key] for layer in record.layers if layer["name"] == name), None)


def _dig(values: Any, *path: str) -> float | None:
    for name in path:
        values = values.get(name) if isinstance(values, dict) else None
    return values


def _layer_error(record: CellRecord) -> float | None:
    errors = [layer["error_after_compensation"] for layer in record.layers]
    known = [error for error in errors if error is not None]
    return statistics.fmean(known) if known else None


_PRUNING_PHASES = ("load", "calibration", "statistics", "solve", "propagate", "write", "finish")


def _peak(record: CellRecord) -> float | None:
    """Return the peak memory of pruning, in bytes, minus the smallest peak among its phases.

    The study's process keeps the dense model and its outputs from one cell to the next. No method needs this memory, and the
    smallest peak estimates it.
    """
    name = "host_peak_bytes" if record.device_peak_bytes is None else "device_peak_bytes"
    peak = getattr(record, name)
    known = [found for phase in _PRUNING_PHASES if (found := _dig(record.phases, phase, name)) is not None]
    return peak - min(known) if known and peak is not None else None


def _alone(read: Callable[[CellRecord], float | None]) -> Callable[[CellRecord], float | None]:
    """Return a reader of seconds that returns None if the device was shared with other cells, so times are not comparable."""
    return lambda record: read(record) if record.machine.get("sharers", 1) == 1 else None


_SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def power_of_ten(exponent: int) -> str:
    """Return ``10⁷``."""
    return f"10{str(exponent).translate(_SUPERSCRIPTS)}"


def _scientific(value: float) -> str:
    digits, exponent = f"{value:.2e}".split("e")
    return f"{digits} × {power_of_ten(int(exponent))}"


def _perplexity(value: float) -> str:
    if abs(value) >= 1e6:
        return _scientific(value)
    return f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}"


def _one(value: float) -> str:
    return f"{value:.1f}"


def _two(value: float) -> str:
    return f"{value:.2f}"


def _plain(value: float) -> str:
    return f"{value:g}"


def _seconds(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 10 else f"{value:,.1f}" if abs(value) < 100 else f"{value:,.0f}"


def _two_significant(value: float) -> str:
    """Return two significant digits, or all digits before the decimal point if these are more."""
    if value == 0 or abs(value) >= 10:
        return f"{value:,.0f}"
    if abs(value) < 1e-4:
        return _scientific(value)
    return f"{value:.{1 - math.floor(math.log10(abs(value)))}f}"


def _significant(value: float) -> str:
    """Return about four significant digits."""
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-4:
        return _scientific(value)
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{3 if size >= 1 else 5 if size >= 0.01 else 6}f}"


OTHERS = (
    ("disk_bytes", "on disk (MB)", _seconds, 1e-6, False),
    ("weight_bytes", "weights in memory (MB)", _seconds, 1e-6, False),
    ("tokens_per_second", "tokens/s", _seconds, 1.0, True),
    ("first_token_seconds", "first token (ms)", _seconds, 1e3, False),
    ("layer_width", "layer width", _plain, 1.0, False),
    ("floor_share", "of the time (%)", _one, 1e2, True),
)
"""Name, label, formatter, scale and direction of quantities that cells of a study do not have: those of a comparison and of a
benchmark of layers."""

FIELDS: dict[str, Field] = {
    "cells": Field(lambda r: 1, "cells", _plain),
    "perplexity": Field(lambda r: _dig(r.evaluation, "perplexity"), "perplexity", _perplexity),
    "kl_divergence": Field(lambda r: _dig(r.evaluation, "kl_divergence"), "KL (nats/token)", lambda v: f"{v:.4f}"),
    "top1_agreement": Field(lambda r: _dig(r.evaluation, "top1_agreement"), "top-1 (%)", _one, 100, higher=True),
    "zero_shot": Field(lambda r: _dig(r.zero_shot, "average", "acc"), "zero-shot (%)", _one, 100, higher=True),
    "zero_shot_stderr": Field(lambda r: _dig(r.zero_shot, "average", "acc_stderr"), "standard error (%)", _one, 100),
    "sparsity": Field(lambda r: _dig(r.effective_sparsity, "targeted"), "measured sparsity (%)", _two, 100),
    "sparsity_asked": Field(lambda r: r.cell["sparsity"], "requested sparsity (%)", _plain, 100),
    "sparsity_all": Field(lambda r: _dig(r.effective_sparsity, "all"), "of all parameters (%)", _two, 100),
    "layer_error": Field(_layer_error, "mean layer error", _significant),
    "seconds": Field(_alone(lambda r: r.seconds), "pruning (s)", _seconds),
    "solve_seconds": Field(_alone(lambda r: _dig(r.phases, "solve", "seconds")), "solving (s)", _seconds),
    "peak_bytes": Field(_peak, "additional peak memory (GiB)", _two, 2**-30),
    "alpha": Field(lambda r: r.cell["outlier_rows"], "α", _plain),
    "block_size": Field(lambda r: r.cell["block_size"], "B", _plain),
    "damping": Field(lambda r: r.cell["damping"], "damping", _plain),
    "samples": Field(lambda r: r.cell["samples"], "samples", _plain),
    **{name: Field(lambda r: None, label, show, scale, higher) for name, label, show, scale, higher in OTHERS},
}
