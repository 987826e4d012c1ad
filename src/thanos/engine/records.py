"""Records of pruned layers and finished blocks, for the report and the journal, with their warnings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from thanos.calibration.statistics import Need, need_of
from thanos.engine.block_error import BlockErrors
from thanos.engine.layer_warnings import layer_warnings
from thanos.engine.tuning_record import TuningRecord
from thanos.model.layers import LinearLayer
from thanos.patterns.units import Units
from thanos.recipe import LayerRecipe
from thanos.solvers.hessian import InputStatistics
from thanos.solvers.prune_layer import PrunedWeight
from thanos.system.meter import PhaseRecord


def layer_record(
    layer: LinearLayer,
    pruned: PrunedWeight,
    inputs: InputStatistics | None,
    settings: LayerRecipe,
    stored: torch.dtype,
    tokens: int,
    error_tokens: int,
    seconds: float,
) -> LayerRecord:
    """Return the record of a pruned layer.

    ``inputs`` is None if nothing was gathered; ``stored`` is the dtype of the stored weight. ``tokens`` calibration tokens
    reached the layer, and the errors were measured on ``error_tokens`` of them.
    """
    rows, columns = layer.shape
    # If tokens reached the layer, but none of the sample that measures the errors, nothing was measured.
    measured = pruned.error_after_compensation is not None and (error_tokens > 0 or tokens == 0)
    return LayerRecord(
        name=layer.name,
        block=layer.block,
        shape=(rows, columns),
        dtype=str(stored).removeprefix("torch."),
        method=pruned.method,
        pattern=settings.pattern,
        sparsity=pruned.zeros / (rows * columns),
        zeros=pruned.zeros,
        outlier_rows=pruned.outliers.numel(),
        halved_rows=pruned.halved.numel(),
        error_before_compensation=pruned.error_before_compensation if measured else None,
        error_after_compensation=pruned.error_after_compensation if measured else None,
        damping=pruned.damping,
        damping_reason=pruned.damping_reason,
        tokens=tokens,
        error_tokens=error_tokens if measured else None,
        seconds=seconds,
        errors=dict(pruned.errors) if measured and len(pruned.errors) > 2 else None,
        residual=([*pruned.residuals.values()] or [None])[-1],
        target_change=([*pruned.target_changes.values()] or [None])[-1],
        removed_units=_removed_units(pruned, settings),
        warnings=[]
        if inputs is None or need_of(settings) is Need.NOTHING
        else layer_warnings(pruned, inputs, tokens, settings),
    )


def _removed_units(pruned: PrunedWeight, settings: LayerRecipe) -> list[int] | None:
    pattern = settings.parsed_pattern
    if not isinstance(pattern, Units):
        return None
    return pattern.removed_units(~pruned.kept.any(0), settings.resolved_sparsity)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockRecord:
    """One finished decoder block.

    Attributes:
        block: index of the block; None for the layers that follow the blocks, such as lm_head.
        layers: records of its pruned layers.
        tensors: name in the checkpoint → checksum of the bytes that were written.
        batch: number of sequences in a forward pass; the last bits of results depend on it. None if there was no pass.
        starts: batch sizes of the pass that gave the block's outputs; see :class:`~thanos.engine.block_runner.Passes`.
        dense_starts: batch sizes of the pass that gave the dense block's outputs; empty without a dense stream.
        tier: storage tier of the activations.
        notes: warnings that arose in this block.
        errors: the block's error after each stage; None without a dense stream.
        phases: seconds and peak memory of the whole run so far, by phase.
        tuning: record of the block's tuning; None if it was not tuned.
    """

    block: int | None
    layers: list[LayerRecord]
    tensors: dict[str, str] = field(default_factory=dict)
    batch: int | None = None
    starts: list[tuple[int, int]] = field(default_factory=list)
    dense_starts: list[tuple[int, int]] = field(default_factory=list)
    tier: str = ""
    notes: list[str] = field(default_factory=list)
    errors: BlockErrors | None = None
    phases: dict[str, PhaseRecord] = field(default_factory=dict)
    tuning: TuningRecord | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BlockRecord:
        """Build a record from the values of :meth:`to_dict` after a round trip through JSON."""
        values = dict(values)
        values["layers"] = [LayerRecord(**{**layer, "shape": tuple(layer["shape"])}) for layer in values["layers"]]
        for name in ("starts", "dense_starts"):
            values[name] = [(first, size) for first, size in values.get(name, [])]
        values["errors"] = BlockErrors(**values["errors"]) if values.get("errors") else None
        values["phases"] = {name: PhaseRecord(**phase) for name, phase in values["phases"].items()}
        values["tuning"] = None if values["tuning"] is None else TuningRecord(**values["tuning"])
        return cls(**values)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRecord:
    """One pruned layer.

    Attributes:
        name: full module name.
        block: index of its decoder block; None outside the blocks.
        shape: (output rows, input columns).
        dtype: dtype of the stored weight, such as ``bfloat16``.
        method: name of the method that ran.
        pattern: the layer's pattern as text, such as ``2:4``.
        sparsity: fraction of zeros in the written weight.
        zeros: number of zeros in the written weight.
        outlier_rows: number of rows left dense.
        halved_rows: number of rows that keep half of the pattern's non-zeros, to offset the dense rows (``keep_budget``).
        error_before_compensation: relative output error if the removed weights were only set to zero:
            tr(Δ H Δᵀ) / tr(W H Wᵀ), H from the calibration tokens; None if it was not measured, or is unknown because no token
            with a non-zero input reached the layer.
        error_after_compensation: the same error for the pruned weight.
        damping: damping of the solve, as a fraction of the Hessian's mean diagonal; None if the method uses none.
        damping_reason: why the damping differs from the recipe's; empty if it does not.
        tokens: number of calibration tokens that reached the layer, of those that were run for its statistics.
        seconds: seconds of the layer's solve.
        warnings: warnings for a reader of the report.
        error_tokens: number of tokens on which the errors were measured; fewer than ``tokens`` if only a sample was used, None
            if no error was measured.
        changed_by: names of the stages that changed the weight after pruning, in order; None if there are none. ``sparsity``
            and ``zeros`` describe the written weight, the errors the weight before these stages.
        dense_target: fraction α of the dense model's outputs in the target that the layer was fitted to; None without a dense
            target.
        errors: the errors by step, see :class:`~thanos.solvers.pruned_weight.PrunedWeight`; None if only the method ran.
        residual: the last of the ``residuals`` of that class; None if there are none.
        target_change: the last of its ``target_changes``; None without a dense target.
        removed_units: indices of the removed units, ascending; None if the pattern removes no units. The other attributes
            describe the layer before the model was made smaller.
        choice: candidate for the dense target, as text → error of the layer's outputs with stand-ins; None for a layer in a
            block, whose record has the choice, and without a choice.
    """

    name: str
    block: int | None
    shape: tuple[int, int]
    dtype: str
    method: str
    pattern: str
    sparsity: float
    zeros: int
    outlier_rows: int
    error_before_compensation: float | None
    error_after_compensation: float | None
    damping: float | None
    damping_reason: str
    tokens: int
    seconds: float
    warnings: list[str] = field(default_factory=list)
    halved_rows: int = 0
    error_tokens: int | None = None
    changed_by: list[str] | None = None
    dense_target: float | None = None
    errors: dict[str, float | None] | None = None
    residual: float | None = None
    target_change: float | None = None
    removed_units: list[int] | None = None
    choice: dict[str, float | None] | None = None


def without_unset(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain values of a :class:`LayerRecord` without the optional fields that are not set."""
    unset = ("dense_target", "errors", "residual", "target_change", "removed_units", "choice")
    return {name: value for name, value in layer.items() if name not in unset or value is not None}


def mean_known(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if all are None."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


class BlockJournal(Protocol):
    """The journal of finished blocks, as the engine uses it.

    Attributes:
        finished: the latest valid record of each finished block.
    """

    finished: dict[int | None, BlockRecord]

    def record(self, record: BlockRecord, written: Sequence[str]) -> None:
        """Write a block's tensors durably to the disk, then record that the block is finished.

        ``record`` has neither ``tensors`` nor ``phases`` yet; ``written`` are the names of the tensors in the checkpoint.
        """
        ...


class NoJournal:
    """The journal of a run that is never resumed: it records nothing."""

    def __init__(self) -> None:
        self.finished: dict[int | None, BlockRecord] = {}

    def record(self, record: BlockRecord, written: Sequence[str]) -> None:
        """Record nothing."""
