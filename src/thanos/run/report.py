"""``pruning.json``, the report of a pruning run: settings, results, seconds and memory. docs/formats.md has the format."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thanos.engine.block_error import BlockErrors
from thanos.engine.records import LayerRecord, mean_known, without_unset
from thanos.engine.tuning_record import TuningRecord
from thanos.system.documents import Document
from thanos.system.meter import PhaseRecord

SCHEMA = 1
"""Version of the format; increased when a reader of the old format would misread the new one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseRecord:
    """One tensor that was not pruned.

    Attributes:
        name: its parameter name, or its name in the checkpoint if no parameter uses it.
        parameters: number of entries.
        reason: why it was not pruned.
    """

    name: str
    parameters: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PruningReport(Document):
    """The report of a run; the attributes are the keys of ``pruning.json``.

    ``block_errors``, ``tuning``, ``recovery`` and ``cut`` are left out if they are empty.
    """

    thanos_version: str
    model: dict[str, Any]
    recipe: dict[str, Any]
    versions: dict[str, str]
    calibration: dict[str, Any]
    totals: dict[str, Any]
    layers: list[LayerRecord]
    dense: list[DenseRecord]
    phases: dict[str, PhaseRecord]
    seconds: float
    host_peak_bytes: int
    device_peak_bytes: int | None = None
    warnings: list[str] = field(default_factory=list)
    execution: dict[str, Any] = field(default_factory=dict)
    block_errors: list[BlockErrors] = field(default_factory=list)
    tuning: list[TuningRecord] = field(default_factory=list)
    recovery: dict[str, Any] = field(default_factory=dict)
    cut: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def layers_lose(self) -> bool:
        """Whether the layers lose weights, so that their errors are those of the pruning.

        If blocks are removed, a layer is fitted to the outputs of the blocks after it, so it has other outputs on purpose.
        """
        return not self.cut.get("dropped_blocks")

    @property
    def made_by(self) -> str:
        """The method and the pattern, and for how many layers other ones were chosen (``overrides`` of the recipe)."""
        recipe = self.recipe["method"], self.recipe["pattern"]
        others = Counter((layer.method, layer.pattern) for layer in self.layers)
        del others[recipe]
        parts = [f"method {recipe[0]}, pattern {recipe[1]}"]
        for (method, pattern), count in others.items():
            what = [f"method {method}"] * (method != recipe[0]) + [f"pattern {pattern}"] * (pattern != recipe[1])
            parts.append(f"{', '.join(what)} for {count} of {len(self.layers)} layers")
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, without the fields about repairs, recovery and cuts that are empty."""
        values = Document.to_dict(self)
        values["layers"] = [without_unset(layer) for layer in values["layers"]]
        only_repaired = ("block_errors", "tuning", "recovery", "cut")
        return {name: value for name, value in values.items() if name not in only_repaired or value}

    @classmethod
    def read(cls, path: Path) -> PruningReport:
        """Read a report from the file that :meth:`write` wrote. Raises like :meth:`from_dict`."""
        return cls.from_dict(json.loads(path.read_bytes()))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PruningReport:
        """Build a report from the values of :meth:`to_dict`. Raises ValueError if the schema is not this version's."""
        if values.get("schema") != SCHEMA:
            raise ValueError(f"pruning.json has schema {values.get('schema')!r}; this version reads {SCHEMA}")
        values = dict(values)
        values["layers"] = [LayerRecord(**{**layer, "shape": tuple(layer["shape"])}) for layer in values["layers"]]
        values["block_errors"] = [BlockErrors(**record) for record in values.get("block_errors", [])]
        values["dense"] = [DenseRecord(**record) for record in values["dense"]]
        values["phases"] = {name: PhaseRecord(**record) for name, record in values["phases"].items()}
        values["tuning"] = [TuningRecord(**record) for record in values.get("tuning", [])]
        return cls(**values)


def compute_totals(layers: Sequence[LayerRecord], *, parameters: int, zeros_elsewhere: int) -> dict[str, Any]:
    """Return the totals of :func:`count_totals` and the mean errors of the layers.

    ``zeros_elsewhere`` is the number of zeros in the tensors that were not pruned.
    """
    zeros = [layer.zeros for layer in layers]
    return {
        **count_totals([layer.shape for layer in layers], zeros, sum(zeros) + zeros_elsewhere, parameters),
        "mean_error_before_compensation": mean_known([layer.error_before_compensation for layer in layers]),
        "mean_error_after_compensation": mean_known([layer.error_after_compensation for layer in layers]),
    }


def count_totals(
    shapes: Sequence[tuple[int, int]], zeros: Sequence[int], zeros_all: int, parameters: int
) -> dict[str, Any]:
    """Return the numbers of parameters and zeros, and the sparsity, of the targeted layers and of the whole model.

    ``shapes`` and ``zeros`` are those of each targeted layer; ``zeros_all`` and ``parameters`` count all tensors of the model.
    """
    targeted = sum(rows * columns for rows, columns in shapes)
    return {
        "parameters": parameters,
        "targeted_parameters": targeted,
        "zeros_targeted": sum(zeros),
        "zeros_all": zeros_all,
        "sparsity_targeted": sum(zeros) / targeted if targeted else 0.0,
        "sparsity_all": zeros_all / parameters if parameters else 0.0,
    }
