"""The contents of a study: the cells of its grids, and their evaluation.

A combination that no recipe allows is a cell too, for example 80 % sparsity with 30 % of the rows left dense. It becomes a
failed cell with a reason. The other cells of the product still run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from thanos import registry
from thanos.patterns.units import HEADS
from thanos.recipe import LayerRecipe, Recipe
from thanos.recipe.allocation import ALLOCATIONS
from thanos.recipe.layer import checked
from thanos.recipe.repair import REPAIR_FIELDS, Repair, resolved
from thanos.recipe.units import HEAD_UNITS, default_multiple
from thanos.registry import EffortRow, parse_pattern
from thanos.run.names import public_name as public

DENSE = "dense"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One point of the grid, normalised so that equal runs are equal cells.

    A field is None if the method or pattern does not use it: the damping of a method that does not compensate, the sparsity of
    a pattern that determines it, and for ``dense`` all fields except the model and the method. It is None too if it equals its
    default: a scope that is the method's or the effort's, ``multiple_of`` and ``head_unit`` of the pattern, the effort
    ``fast``, a part of the repair that the effort sets. The fields are those of :class:`~thanos.recipe.Recipe`.
    """

    model: str
    method: str
    pattern: str | None = None
    sparsity: float | None = None
    outlier_rows: float | None = None
    keep_budget: bool | None = None
    block_size: int | None = None
    damping: float | None = None
    scope: str | None = None
    multiple_of: int | None = None
    head_unit: str | None = None
    allocation: str | None = None
    effort: str | None = None
    dense_target: float | str | None = None
    sequential: bool | None = None
    refit: int | None = None
    tune: int | None = None
    calibration: str | None = None
    samples: int | None = None
    sequence_length: int | None = None
    seed: int | None = None

    def recipe(self, **others: Any) -> Recipe:
        """Return the recipe of the cell; ``others`` add or replace settings. Raises RecipeError for a contradiction."""
        values = {name: value for name, value in asdict(self).items() if name != "model" and value is not None}
        return Recipe(**{**values, **others})

    def title(self) -> str:
        """Return a short description of the cell."""
        if self.method == DENSE:
            return f"{public(self.model)} {self.method}"
        parts = [public(self.model), self.method, self.pattern]
        parts += [f"{100 * self.sparsity:g} %"] if self.sparsity is not None else []
        parts += [units] if (units := units_label(asdict(self))) else []
        parts += [f"α {self.outlier_rows:g}{' kept' if self.keep_budget else ''}"] if self.outlier_rows else []
        parts += [f"B {self.block_size}"] if self.block_size is not None else []
        parts += [f"by {self.scope}"] if self.scope is not None else []
        repair = repair_label(asdict(self))
        parts += [repair] if repair else []
        return " ".join([*map(str, parts), f"seed {self.seed}"])


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationPlan:
    """The evaluation of every cell: a text, and whether to compare with the dense model (KL divergence, top-1 agreement).

    ``bos`` only affects models whose tokenizers begin texts with a beginning-of-text token; see :func:`~thanos.evaluate`.
    """

    text: str = "wikitext2"
    sequence_length: int = 2048
    max_windows: int | None = None
    compare: bool = True
    bos: str = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class ZeroShotPlan:
    """Tasks of lm_eval for the cells of the grids with ``zero_shot = true``, and for the dense models of these cells."""

    tasks: tuple[str, ...]
    task_folder: str | None = None
    limit: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """A whole study.

    Attributes:
        models: names of the models in ``study.toml``.
        cost_only: names of the models that are pruned but not evaluated.
        cells: unique cells: the dense models that are evaluated, then the others in the order of the file.
        zero_shot_cells: cells on which the tasks are run.
        evaluation: evaluation of every cell.
        zero_shot: the tasks; None without any.
        dtype: dtype in which the models run.
        keep_models: whether the pruned models stay in the study's folder.
        path: path of ``study.toml``.
        text: content of ``study.toml``.
    """

    models: tuple[str, ...]
    cost_only: frozenset[str]
    cells: tuple[Cell, ...]
    zero_shot_cells: frozenset[Cell]
    evaluation: EvaluationPlan
    zero_shot: ZeroShotPlan | None
    dtype: str
    keep_models: bool
    path: Path
    text: str = field(repr=False)

    @property
    def evaluates(self) -> bool:
        """Whether any model is evaluated."""
        return not self.cost_only.issuperset(self.models)

    def asked(self, cell: Cell) -> dict[str, Any]:
        """Return the settings outside the cell that affect its record; see ``asked`` of a record in docs/formats.md."""
        if cell.model in self.cost_only:
            return {"dtype": self.dtype, "evaluation": None, "zero_shot": None}
        evaluation = asdict(self.evaluation) | {"text": public(self.evaluation.text)}
        del evaluation["bos"]  # only some tokenizers have one: Locations.asked adds it
        zero_shot = None
        if self.zero_shot is not None and cell in self.zero_shot_cells:
            zero_shot = {"tasks": list(self.zero_shot.tasks), "limit": self.zero_shot.limit}
        return {"dtype": self.dtype, "evaluation": evaluation, "zero_shot": zero_shot}


_REPAIR = ("allocation", "effort", *(field.name for field in fields(Repair)))
NEWER = ("scope", "multiple_of", "head_unit", *_REPAIR)
"""Fields of a cell that a record lacks if they are None, since stores of older versions do not have these fields."""


def units_label(cell: Mapping[str, Any]) -> str:
    """Return a short text with ``multiple_of`` and ``head_unit`` of a cell: ``multiple of 256``; empty for the defaults.

    Args:
        cell: values of a :class:`Cell`, or of a record's ``cell``.
    """
    multiple, unit = cell.get("multiple_of"), cell.get("head_unit")
    parts = [f"multiple of {multiple}"] if multiple is not None else []
    return ", ".join([*parts, *([f"head unit {unit}"] if unit is not None else [])])


def repair_label(cell: Mapping[str, Any]) -> str:
    """Return a short text with the allocation and the repair of a cell: ``effort max, tune 0``; empty without them."""
    words = {True: "yes", False: "no"}
    settings = {name: cell.get(name) for name in _REPAIR if cell.get(name) is not None}
    texts = {
        name: words[value] if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else value
        for name, value in settings.items()
    }
    return ", ".join(f"{name.replace('_', ' ')} {text}" for name, text in texts.items())


def public_cell(cell: Cell) -> dict[str, Any]:
    """Return the cell as written to the store: without local paths, and without fields of :data:`NEWER` that are None.

    So cells without these settings are equal to those in stores of older versions.
    """
    values = asdict(cell) | {"model": public(cell.model)}
    values = {name: value for name, value in values.items() if value is not None or name not in NEWER}
    return values | {"calibration": None if cell.calibration is None else public(cell.calibration)}


def product(axes: dict[str, tuple[Any, ...]]) -> Iterator[Cell]:
    """Yield the cells of one grid. The first axis varies slowest. Absent axes have the recipe's default.

    ``axes`` maps fields of :class:`Cell` to their values; ``model`` must be among them.
    """
    defaults = Recipe()
    values = {f.name: (getattr(defaults, f.name),) for f in fields(Cell) if f.name != "model"} | axes
    names = [*axes, *(name for name in values if name not in axes)]
    for point in itertools.product(*(values[name] for name in names)):
        yield _normal(Cell(**dict(zip(names, point, strict=True))))


def _normal(cell: Cell) -> Cell:
    """Return the cell with None in the fields that its method and pattern do not use, and with defaults filled in."""
    pattern = parse_pattern(cell.pattern or "")
    cell = replace(cell, pattern=str(pattern), outlier_rows=float(cell.outlier_rows or 0))
    if not cell.outlier_rows:
        cell = replace(cell, keep_budget=False)
    if pattern.sparsity is not None:
        cell = replace(cell, sparsity=None)
    elif cell.sparsity is None:
        cell = replace(cell, sparsity=LayerRecipe(pattern=str(pattern)).resolved_sparsity)
    method = registry.method(cell.method)
    cell = _normal_repair(cell)
    damps = "damping" in method.settings or resolved_repair(cell).needs_gram
    damping = float(cell.damping or 0) if damps else None
    if "block_size" not in method.settings or pattern.whole_columns:
        block_size = None
    else:
        block_size = cell.block_size or method.default_block_size(pattern)
    own = registry.effort(cell.effort or registry.DEFAULT_EFFORT).scope or method.scope
    scope = None if not pattern.any_entries or cell.scope == own else cell.scope
    multiple = None if default_multiple(pattern) in (None, cell.multiple_of) else cell.multiple_of
    unit = cell.head_unit if HEADS in pattern.unit_kinds and cell.head_unit != HEAD_UNITS[0] else None
    return replace(cell, block_size=block_size, damping=damping, scope=scope, multiple_of=multiple, head_unit=unit)


def resolved_repair(cell: Cell) -> Repair:
    """Return the parts of a cell's repair, with the effort's values for parts that are None."""
    return resolved(checked(_repair_settings(cell)))


def _normal_repair(cell: Cell) -> Cell:
    """Return the cell with the effort that agrees with most parts of its repair, and with None for these parts.

    Only efforts with the same scope as the cell's are considered; of several the first is chosen. So two ways to write the same
    repair give equal cells. The effort ``fast`` is None.
    """
    repair, effort = resolved_repair(cell), registry.effort(cell.effort or registry.DEFAULT_EFFORT)
    parts = {part.name: getattr(repair, part.name) for part in fields(Repair)}

    def others(row: EffortRow) -> dict[str, Any]:
        return {name: None if value == getattr(row, name) else value for name, value in parts.items()}

    alike = [row for row in registry.efforts() if row.scope == effort.scope]
    row = min(alike, key=lambda row: sum(value is not None for value in others(row).values()))
    return replace(
        cell,
        allocation=None if cell.allocation == ALLOCATIONS[0] else cell.allocation,
        effort=None if row.name == registry.DEFAULT_EFFORT else row.name,
        **others(row),
    )


def _repair_settings(cell: Cell) -> dict[str, Any]:
    values = {name: getattr(cell, name) for name in REPAIR_FIELDS}
    return values | {"effort": cell.effort or registry.DEFAULT_EFFORT}
