"""From a pruned layer to its record in the report, with what a reader should know about it."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from thanos.recipe import LayerRecipe
from thanos.report import LayerRecord
from thanos.solvers import PrunedWeight
from thanos.solvers.factor import InputStatistics
from thanos.structure import LinearLayer

_BAD_CONDITION = 1e6
"""Above this, float32 solves keep fewer than one digit in ten of their precision."""


def layer_record(
    layer: LinearLayer,
    pruned: PrunedWeight,
    inputs: InputStatistics,
    settings: LayerRecipe,
    stored: torch.dtype,
    tokens: int,
    seconds: float,
) -> LayerRecord:
    """Return the record of a layer pruned by ``settings`` on ``inputs``, its weight stored as ``stored``."""
    rows, columns = layer.shape
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
        error_before_compensation=pruned.error_before_compensation,
        error_after_compensation=pruned.error_after_compensation,
        damping=pruned.damping,
        damping_reason=pruned.damping_reason,
        tokens=tokens,
        seconds=seconds,
        warnings=_warnings(pruned, inputs, tokens, settings),
    )


def _warnings(pruned: PrunedWeight, inputs: InputStatistics, tokens: int, settings: LayerRecipe) -> list[str]:
    """Say what a reader of the report should know about one layer."""
    columns = inputs.matrix.shape[0]
    lines = []
    if pruned.method != settings.method:
        cause = (
            f"all {tokens} calibration tokens were zero here" if tokens else "no calibration token reached this layer"
        )
        lines.append(f"{cause}: pruned by {pruned.method}, not {settings.method}")
    elif 0 < tokens < columns:
        lines.append(f"only {tokens} calibration tokens for {columns} input columns: {_FEW}")
    dead = inputs.dead_columns
    if 0 < dead < columns:
        lines.append(f"{dead} of {columns} input columns were never excited")
    if pruned.damping_reason:
        lines.append(f"damping raised to {pruned.damping:g}: {pruned.damping_reason}")
    if pruned.damping is not None:
        condition = inputs.condition(settings.damping)
        if condition > _BAD_CONDITION:
            lines.append(f"the damped Hessian is badly conditioned: condition number about {condition:.1e}")
    return lines


def warning_lines(layers: Iterable[LayerRecord], *, quote: str = "") -> list[str]:
    """Return one line for each kind of warning that layers have: what differs only in its numbers is one kind.

    Args:
        layers: in the order of the model.
        quote: what goes before and after a layer's name.
    """
    kinds: dict[str, list[tuple[LayerRecord, str]]] = {}
    for layer in layers:
        for line in layer.warnings:
            kinds.setdefault(_kind(line), []).append((layer, line))
    return [_one_line(found, quote) for found in kinds.values()]


_NUMBER = r"\d+(?:\.\d+)?(?:e[+-]?\d+)?"
_NUMBERS = re.compile(f"{_NUMBER}(?:, {_NUMBER})*")


def _kind(line: str) -> str:
    return _NUMBERS.sub("#", line)


_FEW = "the Hessian is singular but for damping"


def _one_line(found: list[tuple[LayerRecord, str]], quote: str) -> str:
    layer, line = found[0]
    if line.endswith(_FEW):
        layer = min((layer for layer, _ in found), key=lambda layer: layer.tokens / layer.shape[1])
        who = "1 layer has" if len(found) == 1 else f"{len(found)} layers have"
        return (
            f"{who} fewer calibration tokens than input columns, at worst {layer.tokens / layer.shape[1]:.2g} a column "
            f"({layer.tokens} for {layer.shape[1]} in {quote}{layer.name}{quote}), so that a Hessian is singular but for "
            "damping; raise --samples"
        )
    if len(found) == 1:
        return f"{quote}{layer.name}{quote}: {line}"
    return f"{len(found)} layers, the first of them {quote}{layer.name}{quote}: {line}"
