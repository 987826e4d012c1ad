"""The rows that a report compares. A row groups the cells that differ only in their seed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from thanos import registry
from thanos.errors import RecipeError
from thanos.recipe import LayerRecipe
from thanos.registry import parse_pattern
from thanos.study.grid import repair_label, units_label
from thanos.study.report.comparable import calibration_of, damping_of, is_cost_only, most_common, select_cells
from thanos.study.report.numbers import Number, field_of, mean, spread
from thanos.study.store import CellRecord


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """The cells of one setting, which differ only in their seed. The other attributes are those of a record's ``cell``.

    Attributes:
        sparsity: requested sparsity; if the pattern fixes it, that of the pattern. The measured one of the first seed if this
            version lacks the pattern.
        units: ``multiple_of`` and ``head_unit``, see :func:`~thanos.study.grid.units_label`; empty for the defaults.
        repair: allocation and repair, see :func:`~thanos.study.grid.repair_label`; empty without either.
        alpha: fraction of outlier rows.
        records: the cells, sorted by seed.
        whole: the row of which this one is a part, see :meth:`only`; None for a whole row.
        related: rows of the same method, pattern and sparsity, whose spread is used if this row has only one seed.
    """

    model: str
    method: str
    pattern: str
    sparsity: float
    units: str
    alpha: float
    keep_budget: bool
    block_size: int | None
    damping: float | None
    calibration: str | None
    samples: int | None
    sequence_length: int | None
    scope: str | None
    repair: str
    records: tuple[CellRecord, ...]
    whole: Row | None = None
    related: tuple[Row, ...] = ()

    @property
    def name(self) -> str:
        """The method's name."""
        return title_of(self.method)

    @property
    def label(self) -> str:
        """The method and its settings other than the defaults: ``Thanos α = 0.1, budget kept, B = 64``."""
        parts = [f"α = {self.alpha:g}"] if self.alpha else []
        parts += ["budget kept"] if self.keep_budget and self.alpha else []
        parts += [] if self.has_default_block else [f"B = {self.block_size}"]
        parts += [f"budget per {self.scope}"] if self.scope else []
        parts += [self.repair] if self.repair else []
        return " ".join([self.name, ", ".join(parts)]).strip()

    @property
    def pattern_label(self) -> str:
        """The pattern, with the requested sparsity unless the pattern implies it: ``columns 30 %``, and the units."""
        if self.pattern and (self.whole or self).records[0].cell["sparsity"] is None:
            return self.pattern
        return ", ".join([f"{self.pattern} {percent(self.sparsity)}", *([self.units] if self.units else [])])

    @property
    def setting(self) -> str:
        """Pattern label and label."""
        return f"{self.pattern_label}, {self.label}"

    @property
    def has_default_block(self) -> bool:
        """Whether the block size is the recipe's default."""
        if self.block_size is None:
            return True
        try:
            default = LayerRecipe(method=self.method, pattern=self.pattern).resolved_block_size
        except RecipeError:  # a method of another version
            return True
        return self.block_size == default

    @property
    def order(self) -> tuple[Any, ...]:
        """The sort key of rows."""
        methods = ("dense", *registry.method_names())
        position = methods.index(self.method) if self.method in methods else len(methods)
        return (
            *pattern_order(self.pattern),
            self.sparsity,
            self.units,
            position,
            self.method,
            self.alpha,
            self.keep_budget,
            self.block_size or 0,
            self.scope or "",
            self.repair,
        )

    def mean(self, field: str) -> Number | None:
        """Return the mean of a field over the seeds; None if no cell has it."""
        return mean(self.records, field)

    def spread(self, field: str) -> Number | None:
        """Return a field's sample standard deviation over the seeds, seeds of equal windows as one; None for fewer than 2."""
        return spread(self.draws, field)

    def noise(self, field: str = "perplexity") -> Number | None:
        """Return the spread of a field that the draw of the calibration text causes; None if it is unknown.

        This is the spread of the whole row, or, for a row with one seed, the largest spread of the :attr:`related` rows.
        """
        own = (self.whole or self).spread(field)
        if own is not None:
            return own
        spreads = [found for row in self.related if (found := row.spread(field)) is not None]
        return max(spreads, key=lambda number: number.value, default=None)

    def only(self, seeds: Iterable[int | None]) -> Row:
        """Return the row with only the cells of these seeds. Its :meth:`noise` is still that of the whole row."""
        wanted = set(seeds)
        records = tuple(record for record in self.records if record.cell["seed"] in wanted)
        return dataclasses.replace(self, records=records, whole=self.whole or self)

    def seeds_with(self, field: str) -> set[int | None]:
        """Return the seeds of the cells that have a field. For example, not every seed has zero-shot tasks."""
        read = field_of(field).read
        return {record.cell["seed"] for record in self.records if read(record) is not None}

    @property
    def draws(self) -> tuple[CellRecord, ...]:
        """The first cell for each set of calibration windows. A cell without a hash of its windows is always included."""
        found: dict[str, CellRecord] = {}
        for record in self.records:
            windows = (record.calibration or {}).get("sha256") or record.key
            found.setdefault(windows, record)
        return tuple(found.values())

    def value(self, field: str) -> float:
        """Return the mean of a field that every done cell has, as a float."""
        number = self.mean(field)
        assert number is not None, f"{self.setting} has no {field}"
        return number.value


def percent(share: float) -> str:
    """Return a fraction as ``30 %``."""
    return f"{100 * share:g} %" if round(100 * share, 6) == round(100 * share) else f"{100 * share:.2f} %"


def title_of(method: str) -> str:
    """Return a method's display name."""
    return "Dense" if method == "dense" else registry.method_title(method)


def pattern_order(pattern: str) -> tuple[int, str]:
    """Return the sort key of a pattern: patterns of the registry in its order, then others by name."""
    known = registry.example_patterns()
    return (known.index(pattern) if pattern in known else len(known), pattern)


class Results:
    """The cells of one model that can be compared.

    Args:
        model: name of the model.
        records: the done cells of a store, of any model.

    Attributes:
        rows: rows with the calibration and damping of most rows (``base``), without a repair, and with the method's scope.
        scoped, repaired: the same with another scope, and with a repair or an allocation.
        variations: rows with another calibration or damping.
        left_out: cells that are not compared, see comparable.py.
        cost_only: whether the study lists the model in ``cost_only``, so that none of its cells was evaluated.
    """

    def __init__(self, model: str, records: Iterable[CellRecord]) -> None:
        own = [record for record in records if record.cell["model"] == model]
        self.model = model
        self.cost_only = bool(own) and all(is_cost_only(record) for record in own)
        own, self.left_out = select_cells(own)
        self.dense = next((row for row in _rows(own) if row.method == "dense"), None)
        pruned = [row for row in _rows(own) if row.method != "dense"]
        cells = [record for row in pruned for record in row.records]
        text = most_common(calibration_of, cells) or (None, None, None)
        damping = most_common(damping_of, cells) or (None,)
        self.base = (*text, *damping)
        base = [row for row in pruned if self._is_base(row)]
        base = [dataclasses.replace(row, related=_related(row, base)) for row in base]
        self.repaired = [row for row in base if row.repair]
        self.rows = [row for row in base if row.scope is None and not row.repair]
        self.scoped = [row for row in base if row.scope is not None and not row.repair]
        self.variations = [row for row in pruned if not self._is_base(row)]

    def _is_base(self, row: Row) -> bool:
        own = (row.calibration, row.samples, row.sequence_length, row.damping)
        return all(value is None or value == wanted for value, wanted in zip(own, self.base, strict=True))

    def find(self, **settings: Any) -> Row | None:
        """Return the row with these attributes, else None.

        By default α is 0, block size, scope and units are the defaults, and there is no repair.
        """
        wanted = {"alpha": 0.0, **settings}
        return next((row for row in (*self.rows, *self.scoped, *self.repaired) if _matches(row, wanted)), None)

    def select(self, **settings: Any) -> list[Row]:
        """Return the rows with these attributes and any values of the others."""
        return [row for row in self.rows if _matches(row, settings, any_block=True)]


def over_common_seeds(*rows: Row, field: str = "perplexity") -> tuple[Row, ...]:
    """Return the rows restricted to the seeds for which each of them has the field.

    Every comparison of a report uses these. Rows without a common seed have no cells left.
    """
    common = set.intersection(*(row.seeds_with(field) for row in rows)) if rows else set()
    return tuple(row.only(common) for row in rows)


def _related(row: Row, rows: Iterable[Row]) -> tuple[Row, ...]:
    wanted = {name: getattr(row, name) for name in ("method", "pattern", "sparsity", "units", "scope", "repair")}
    return tuple(other for other in rows if _matches(other, wanted, any_block=True))


def models_of(records: Iterable[CellRecord]) -> list[str]:
    """Return the models in the order of the store."""
    return list(dict.fromkeys(record.cell["model"] for record in records))


def _matches(row: Row, wanted: dict[str, Any], *, any_block: bool = False) -> bool:
    if "block_size" not in wanted and not any_block and not row.has_default_block:
        return False
    if "units" not in wanted and not any_block and row.units:
        return False
    if "scope" not in wanted and row.scope is not None:
        return False
    if "repair" not in wanted and row.repair:
        return False
    return all(_equal(getattr(row, name), value) for name, value in wanted.items())


def _equal(value: Any, wanted: Any) -> bool:
    if isinstance(value, float) and isinstance(wanted, int | float):
        return abs(value - wanted) < 1e-9
    return value == wanted


def row_of(records: Iterable[CellRecord]) -> Row:
    """Return the row of cells that differ only in their seed."""
    ordered = tuple(sorted(records, key=lambda record: record.cell["seed"] or 0))
    cell = ordered[0].cell
    return Row(
        model=cell["model"],
        method=cell["method"],
        pattern=cell["pattern"] or "",
        sparsity=_asked_sparsity(ordered[0]),
        units=units_label(cell),
        alpha=cell["outlier_rows"] or 0.0,
        keep_budget=bool(cell["keep_budget"]),
        block_size=cell["block_size"],
        damping=cell["damping"],
        calibration=cell["calibration"],
        samples=cell["samples"],
        sequence_length=cell["sequence_length"],
        scope=cell.get("scope"),
        repair=repair_label(cell),
        records=ordered,
    )


def _rows(records: Iterable[CellRecord]) -> list[Row]:
    groups: dict[str, list[CellRecord]] = {}
    for record in records:
        settings = {name: value for name, value in record.cell.items() if name != "seed"}
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(record)
    return sorted((row_of(cells) for cells in groups.values()), key=lambda row: row.order)


def _asked_sparsity(record: CellRecord) -> float:
    sparsity, pattern = record.cell["sparsity"], record.cell["pattern"]
    if sparsity is None and pattern:
        try:
            sparsity = parse_pattern(pattern).sparsity
        except RecipeError:  # a pattern of another version, or of a file that is not loaded
            sparsity = (record.effective_sparsity or {}).get("targeted")
    return sparsity or 0.0
