"""Warnings about pruned layers and experts, for the report, the model card and the command line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from thanos import registry
from thanos.recipe import LayerRecipe
from thanos.solvers.hessian import InputStatistics
from thanos.solvers.prune_layer import PrunedWeight

if TYPE_CHECKING:
    from thanos.engine.records import LayerRecord

_BAD_CONDITION = 1e6
"""Condition number above which a float32 solve may have less than one correct decimal digit."""

_FEW = "the Hessian is singular without damping"

_NUMBER = r"\d+(?:\.\d+)?(?:e[+-]?\d+)?"
_NUMBERS = re.compile(f"{_NUMBER}(?:, {_NUMBER})*")


def layer_warnings(pruned: PrunedWeight, inputs: InputStatistics, tokens: int, settings: LayerRecipe) -> list[str]:
    """Return the warnings about one layer, for a reader of the report."""
    columns = len(inputs.dead)
    lines = []
    if pruned.method != settings.method:
        cause = (
            f"all {tokens} calibration tokens were zero here"
            if tokens
            else "calibration saw no input of this layer (no token reached it, or the model uses its weight without calling it)"
        )
        lines.append(f"{cause}: pruned by {pruned.method}, not {settings.method}")
    elif 0 < tokens < columns and pruned.damping is not None:  # a method without a Hessian needs no rank
        lines.append(f"only {tokens} calibration tokens for {columns} input columns: {_FEW}")
    dead = inputs.dead_columns
    if 0 < dead < columns:
        lines.append(f"{dead} of {columns} input columns were always zero")
    if pruned.damping_reason:
        lines.append(f"damping raised to {pruned.damping:g}: {pruned.damping_reason}")
    if pruned.condition is not None and pruned.condition > _BAD_CONDITION:
        lines.append(f"the damped Hessian is badly conditioned: condition number about {pruned.condition:.1e}")
    return lines


def warning_lines(layers: Iterable[LayerRecord], *, quote: str = "") -> list[str]:
    """Return one line for each kind of warning. Warnings that differ only in their numbers are of one kind.

    ``layers`` are in the order of the model. ``quote`` is put before and after a layer's name.
    """
    kinds: dict[str, list[tuple[LayerRecord, str]]] = {}
    for layer in layers:
        for line in layer.warnings:
            kinds.setdefault(_kind(line), []).append((layer, line))
    return [_one_line(found, quote) for found in kinds.values()]


def _kind(line: str) -> str:
    return _NUMBERS.sub("#", line)


def _one_line(found: list[tuple[LayerRecord, str]], quote: str) -> str:
    layer, line = found[0]
    if line.endswith(_FEW):
        layer = min((layer for layer, _ in found), key=lambda layer: layer.tokens / layer.shape[1])
        who = "1 layer has" if len(found) == 1 else f"{len(found)} layers have"
        return (
            f"{who} fewer calibration tokens than input columns, at worst {layer.tokens / layer.shape[1]:.2g} per column "
            f"({layer.tokens} for {layer.shape[1]} in {quote}{layer.name}{quote}), so that a Hessian is singular without "
            "damping; raise --samples"
        )
    if len(found) == 1:
        return f"{quote}{layer.name}{quote}: {line}"
    return f"{len(found)} layers, the first of them {quote}{layer.name}{quote}: {line}"


def expert_notes(experts: Mapping[str, str], records: Sequence[LayerRecord]) -> list[str]:
    """Return at most two notes: how many experts received too few calibration tokens, and how many received none.

    ``experts`` maps a layer to the expert that it belongs to. ``records`` are those of all pruned layers, other modules
    included.
    """
    total, few, none = set(experts.values()), set(), set()
    for record in records:
        if record.name in experts and record.tokens < record.shape[1]:
            if not record.tokens:
                none.add(experts[record.name])
            elif record.damping is not None:  # a method without a Hessian needs no rank
                few.add(experts[record.name])
    lines = []
    by = registry.method_without_inputs(registry.parse_pattern(registry.DEFAULT_PATTERN)).name
    if few:
        lines.append(
            f"{len(few):,} of {len(total):,} experts received fewer calibration tokens than they have input columns: their "
            "Hessians are singular without damping; raise --samples"
        )
    if none:
        lines.append(f"{len(none):,} of {len(total):,} experts received no calibration token: pruned by {by}")
    return lines
