"""The inspection of a checkpoint: zeros, patterns, NaN and infinity, counted in the stored weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from thanos._version import __version__
from thanos.checkpoint.entries import count_not_finite
from thanos.errors import ModelError, RecipeError
from thanos.evaluation.shrunk import Shrinkage, compare_with_dense
from thanos.events import Event
from thanos.model.layers import LinearLayer, linear_layers
from thanos.model.opening import OpenedModel, open_model
from thanos.model.source import find_local, resolve_model
from thanos.model.unused import Unused
from thanos.patterns.base import STRAY, Pattern
from thanos.registry import example_patterns, parse_pattern, required_patterns
from thanos.run.report import SCHEMA as REPORT_SCHEMA
from thanos.run.report import DenseRecord, count_totals
from thanos.run.survey import NOT_LINEAR
from thanos.system.documents import Document
from thanos.system.event_stream import EventStream

SCHEMA = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerInspection:
    """One targeted layer.

    Attributes:
        name: full module name.
        shape: (output rows, input columns).
        dtype: dtype of the stored weight.
        zeros: number of zero entries.
        sparsity: fraction of zero entries.
        patterns: the patterns that all rows except the outlier rows satisfy.
        outlier_rows: number of dense rows in a layer that is otherwise pruned.
        zero_columns: number of input columns that are zero in all rows except the outlier rows.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    zeros: int
    sparsity: float
    patterns: list[str]
    outlier_rows: int
    zero_columns: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Violation:
    """A layer that violates the required pattern: its name, and the reason."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class NotFinite:
    """A tensor that contains NaN or infinity.

    Attributes:
        name: name of the parameter, or of the tensor in the file if it belongs to no parameter.
        nan: number of NaN entries.
        infinite: number of infinite entries.
        parameter: whether the tensor is a parameter. If so, the checkpoint is damaged; another tensor, such as a mask with −∞,
            may contain any value.
    """

    name: str
    nan: int
    infinite: int
    parameter: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection(Document):
    """A whole checkpoint; the attributes are the keys of ``inspect --json``.

    Attributes:
        model: as the user named it.
        thanos_version: version of this package.
        require: the required pattern; None without one.
        violations: the targeted layers that violate the required pattern.
        totals: numbers of zeros and of parameters, over the targeted layers and over all tensors.
        layers: the targeted layers. If there is a ``pruning.json``: the layers that it lists as pruned. Otherwise: the linear
            layers of the decoder blocks with more than stray zeros, or all of them if a pattern is required.
        dense: all other tensors, with the reason why each was left dense.
        not_finite: the tensors that contain NaN or infinity.
        smaller: the comparison with the dense parent; None unless one was given.
    """

    model: str
    thanos_version: str
    require: str | None
    violations: list[Violation]
    totals: dict[str, Any]
    layers: list[LayerInspection]
    dense: list[DenseRecord]
    not_finite: list[NotFinite] = field(default_factory=list)
    smaller: Shrinkage | None = None
    schema: int = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, without ``smaller`` if no dense parent was given."""
        values = Document.to_dict(self)
        return {name: value for name, value in values.items() if name != "smaller" or value is not None}

    @property
    def damaged(self) -> list[NotFinite]:
        """The parameters that contain NaN or infinity."""
        return [tensor for tensor in self.not_finite if tensor.parameter]


def inspect_checkpoint(
    model: str | Path,
    *,
    require: str | None = None,
    dense: str | Path | None = None,
    on_event: Callable[[Event], None] | None = None,
    trust_remote_code: bool = False,
) -> Inspection:
    """Read a checkpoint, one tensor at a time, and count zeros, NaN and infinity.

    Args:
        model: a hub name, a local folder or a ``.gguf`` file.
        require: ``N:M``, ``columns`` or a registered pattern. Layers that violate it are listed. An outlier row violates it,
            since software that needs the pattern needs it in every row. So does a layer of the blocks without zeros, unless
            ``pruning.json`` states why it was left dense.
        dense: the dense parent of a smaller model, with which its sizes are compared.
        on_event: function called with events of progress.
        trust_remote_code: let transformers run Python code from the checkpoint.

    Raises:
        ModelError: the model cannot be read, or a pattern is required and no layer is pruned.
        RecipeError: ``require`` is not a pattern that can be checked.
    """
    wanted = None if require is None else _required(require)
    emit = EventStream(on_event)
    find_local(model, trust_remote_code=trust_remote_code)
    emit(Event(kind="phase", phase="load"))
    opened = open_model(resolve_model(model, trust_remote_code=trust_remote_code))
    smaller = None if dense is None else compare_with_dense(opened, dense, trust_remote_code=trust_remote_code)
    known = _read_report(opened)
    infos, total = opened.checkpoint.tensors, len(opened.checkpoint.tensors)
    linear = {opened.key_of.get(layer.weight_name): layer for layer in linear_layers(opened.meta_model)}
    named = {key: name for name, key in opened.key_of.items()}
    unused = Unused(opened.meta_model, infos, opened.key_of)
    parameters = {name for name, _ in opened.meta_model.named_parameters()}
    not_finite: list[NotFinite] = []
    layers: list[LayerInspection] = []
    others: list[DenseRecord] = []
    violations: list[Violation] = []
    zeros_all = 0
    for done, (key, info) in enumerate(infos.items(), 1):
        tensor = opened.checkpoint.read(key)
        zeros = int((tensor == 0).sum())
        zeros_all += zeros
        name, layer = named.get(key, key), linear.get(key)
        nan, infinite = count_not_finite(tensor)
        if nan or infinite:
            not_finite.append(NotFinite(name=name, nan=nan, infinite=infinite, parameter=named.get(key) in parameters))
        if key in named:
            reason = _reason(name, layer, zeros / max(1, info.numel), known, required=wanted is not None)
        else:
            reason = unused.why(key)
        if reason or layer is None:
            others.append(DenseRecord(name=name, parameters=info.numel, reason=reason))
        else:
            found, broken = _inspect_layer(layer, tensor, wanted)
            layers.append(found)
            violations += [Violation(name=layer.name, reason=broken)] if broken else []
        emit(Event(kind="progress", phase="load", done=done, total=total))
    if wanted is not None and not layers:
        raise ModelError(
            f"{model} has no pruned layer that could satisfy pattern {wanted}; give a pruned model, or leave --require out"
        )
    layers, violations = _in_model_order(layers, violations, list(linear.values()))
    return Inspection(
        model=str(model),
        thanos_version=__version__,
        require=None if wanted is None else str(wanted),
        violations=violations,
        totals=count_totals(
            [layer.shape for layer in layers],
            [layer.zeros for layer in layers],
            zeros_all,
            sum(info.numel for info in infos.values()),
        ),
        layers=layers,
        dense=others,
        not_finite=not_finite,
        smaller=smaller,
    )


def _required(text: str) -> Pattern:
    pattern = parse_pattern(text)
    if not pattern.can_be_required:
        raise RecipeError(
            f"--require {pattern} cannot be violated, so there is nothing to check; require {required_patterns()}"
        )
    return pattern


def _read_report(opened: OpenedModel) -> dict[str, str] | None:
    """Return layer name → reason why it is dense (empty for a pruned layer), from ``pruning.json``; None without the file."""
    path = opened.source.folder / "pruning.json"
    if opened.source.gguf is not None or not path.is_file():
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["schema"] != REPORT_SCHEMA:
            raise ValueError(f"schema {report['schema']}")
        dense = {record["name"].removesuffix(".weight"): record["reason"] for record in report["dense"]}
        return dense | {layer["name"]: "" for layer in report["layers"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path} is not a report of this version ({error}); move it away to inspect without it"
        ) from error


def _reason(name: str, layer: LinearLayer | None, zeros: float, known: dict[str, str] | None, *, required: bool) -> str:
    """Return the reason why a tensor counts as left dense; empty if it is targeted.

    Args:
        name: name of the tensor.
        layer: its linear layer; None if it is not the weight of one.
        zeros: fraction of zero entries.
        known: result of :func:`_read_report`.
        required: whether a pattern is required, so that layers of the blocks without zeros are targeted too.
    """
    if layer is None:
        return NOT_LINEAR
    if known is not None and layer.name in known:
        return known[layer.name]
    if layer.block is None:
        return "outside the decoder blocks"
    if layer.router:
        return "routes tokens to experts"
    return "" if required or zeros > STRAY else "no zeros, and no report that says why"


def _inspect_layer(layer: LinearLayer, stored: Tensor, wanted: Pattern | None) -> tuple[LayerInspection, str]:
    weight = layer.oriented(stored)
    zero = weight == 0
    zeros = int(zero.sum())
    rows, columns = layer.shape
    # In a layer with more than stray zeros, a row with at most stray zeros is an outlier row.
    dense_rows = zero.sum(1) <= STRAY * columns if zeros > STRAY * weight.numel() else zero.new_zeros(rows)
    rest = zero[~dense_rows]
    zero_columns = rest.all(0) if len(rest) else zero.new_zeros(columns)
    shown = map(parse_pattern, example_patterns(required=True))
    looked_for: dict[Pattern, None] = dict.fromkeys((*shown, *([wanted] if wanted else [])))
    inspection = LayerInspection(
        name=layer.name,
        shape=(rows, columns),
        dtype=str(stored.dtype).removeprefix("torch."),
        zeros=zeros,
        sparsity=zeros / max(1, weight.numel()),
        patterns=[str(pattern) for pattern in looked_for if len(rest) and not pattern.violation(rest)],
        outlier_rows=int(dense_rows.sum()),
        zero_columns=int(zero_columns.sum()),
    )
    return inspection, wanted.violation(zero) if wanted else ""


def _in_model_order(
    layers: Sequence[LayerInspection], violations: Sequence[Violation], order: Sequence[LinearLayer]
) -> tuple[list[LayerInspection], list[Violation]]:
    """Sort by the layers' order in the model, since a checkpoint stores its tensors in another order."""
    position = {layer.name: index for index, layer in enumerate(order)}
    return (
        sorted(layers, key=lambda layer: position[layer.name]),
        sorted(violations, key=lambda violation: position[violation.name]),
    )
