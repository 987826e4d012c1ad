"""The layers of a checkpoint that can be packed, and the reason why each other linear layer stays dense."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thanos.checkpoint.reader import SafetensorsCheckpoint
from thanos.events import Event, Watcher
from thanos.model.layers import LinearLayer, linear_layers
from thanos.model.opening import OpenedModel
from thanos.sparse.encoding import choose_format, count_entries
from thanos.sparse.formats import DTYPES, MOST_UNITS, PackedSpec, strip_parts
from thanos.sparse.tiles import SIDE, UNIT

LEAST_WEIGHTS = 1 << 16
"""Smaller layers stay dense: the launch of a kernel costs more than their bytes."""

MOST_BYTES = 0.9
"""A layer is packed if it then takes at most this fraction of its dense bytes."""


_SMALL, _DENSE = "too small", "too dense"

_PRUNE = "prune it first, for example with --pattern 16:32"

_CHANGES = {
    _SMALL: "lower --least-weights",
    _DENSE: _PRUNE,
    **dict.fromkeys(("float32", "float64"), f"{_PRUNE} --output-dtype bfloat16"),
}
"""Reason, up to its colon → what a user can change about it."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A linear layer, with its packed format or the reason why it stays dense.

    Attributes:
        name: full module name.
        key: name of its weight in the checkpoint; empty if it has no tensor of its own.
        shape: (rows, columns), as (outputs, inputs).
        dense_bytes: bytes of its weight in the checkpoint.
        spec: how it is packed; None if it stays dense.
        counts: sizes of its tiles, from :func:`~thanos.sparse.encoding.count_entries`; None if it stays dense.
        reason: why it stays dense; empty if it is packed.
    """

    name: str
    key: str
    shape: tuple[int, int]
    dense_bytes: int
    spec: PackedSpec | None
    counts: Tensor | None
    reason: str


def find_candidates(
    opened: OpenedModel, stored: SafetensorsCheckpoint, least_weights: int, emit: Watcher
) -> list[Candidate]:
    """Return every linear layer of a model, each with its format or the reason why it stays dense.

    All weights are read once and their entries are counted; no report is trusted. ``stored`` are the checkpoint's files, and
    ``least_weights`` is the smallest number of weights of a packed layer.
    """
    layers = linear_layers(opened.meta_model)
    embedding = getattr(opened.meta_model.get_input_embeddings(), "weight", None)
    found = []
    for done, layer in enumerate(layers, 1):
        key = opened.key_of.get(layer.weight_name, "")
        own = key in stored.tensors and not layer.expert
        tied = layer.module.get_parameter("weight") is embedding or not key
        dense_bytes = stored.tensors[key].nbytes if own and not tied else 0
        reason = _reason(layer, stored, key if own else "", least_weights, tied=tied)
        spec, counts = None, None
        if not reason:
            spec, counts, reason = _measure(stored, key)
        found.append(Candidate(layer.name, key if own else "", layer.shape, dense_bytes, spec, counts, reason))
        emit(Event(kind="progress", phase="load", done=done, total=len(layers)))
    return found


def why_none(candidates: Sequence[Candidate]) -> str:
    """Return why most layers stay dense, and what to change; to be added to a message that no layer is packed.

    Args:
        candidates: layers that all stay dense.
    """
    if not candidates:
        return ": it has no linear layers"
    kinds = [one.reason.partition(":")[0] for one in candidates]
    (kind, count), *_ = Counter(kinds).most_common(1)
    reason = candidates[kinds.index(kind)].reason
    change = _CHANGES.get(kind)
    return f" ({count} of {len(candidates)} layers: {reason}){f'; {change}' if change else ''}"


def matrix_parts(stored: SafetensorsCheckpoint, key: str) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (first strip, end, rows) of the parts of a matrix; each is mapped alone and leaves memory when it is dropped."""
    rows, columns = stored.tensors[key].shape
    for first, last in strip_parts(rows, columns):
        count = min(SIDE * last, rows) - SIDE * first
        yield first, last, stored.entries(key, SIDE * first * columns, count * columns).view(count, columns)


def _measure(stored: SafetensorsCheckpoint, key: str) -> tuple[PackedSpec | None, Tensor | None, str]:
    """Return the spec and the counts of a weight that is worth packing, or the reason why it is not."""
    info = stored.tensors[key]
    counts = torch.cat([count_entries(rows) for _, _, rows in matrix_parts(stored, key)], 1)
    spec = choose_format(counts, (info.shape[0], info.shape[1]), info.dtype)
    share = spec.nbytes / spec.dense_bytes
    if share <= MOST_BYTES:
        return spec, counts, ""
    if spec.n == SIDE:
        return None, None, f"too large: the bitmap format holds {4 * UNIT * MOST_UNITS / 2**30:.0f} GiB at most"
    least = torch.iinfo(torch.int16).min
    negative = sum(int((rows.view(torch.int16) == least).sum()) for _, _, rows in matrix_parts(stored, key))
    signed = f"; {negative:,} zeros are negative, which count as entries" if negative else ""
    return None, None, f"{_DENSE}: packed it would take {100 * share:.0f} % of its bytes{signed}"


def _reason(layer: LinearLayer, stored: SafetensorsCheckpoint, key: str, least_weights: int, *, tied: bool) -> str:
    """Return why a layer cannot be packed, regardless of its entries; empty if it can."""
    if layer.router:
        return "routes tokens to experts"
    if layer.expert:
        return "an expert: transformers runs the experts of a mixture as one tensor"
    if layer.transposed:
        return "stored transposed"
    if tied:
        return "shares its weight with the input embedding"
    if not key:
        return "a part of a larger tensor"
    info = stored.tensors[key]
    if info.dtype not in DTYPES.values():
        return f"{str(info.dtype).removeprefix('torch.')}: only {' and '.join(DTYPES)} are packed"
    if not key.endswith(".weight"):
        return "its tensor is not named weight"
    if info.numel < least_weights:
        return f"{_SMALL}: fewer than {least_weights:,} weights"
    return ""
