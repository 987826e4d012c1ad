"""The removable units of a model, neurons and heads, and the entries of parameters that belong to them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from thanos.errors import ModelError
from thanos.patterns.units import HEADS as HEADS
from thanos.patterns.units import NEURONS as NEURONS
from thanos.shrink.families import Cut, family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUP, QUERY = "group", "query"
"""The unit of heads with grouped-query attention: a key-value head with its query heads, or one query head of every group."""


@dataclass(frozen=True, slots=True)
class Slice:
    """A parameter of a block that loses entries along one axis with the units.

    Attributes:
        name: name of the parameter relative to the block.
        axis: the axis along which entries are removed.
        index: int64 (units, entries per unit), the positions along ``axis`` that belong to each unit.
    """

    name: str
    axis: int
    index: Tensor


@dataclass(frozen=True, slots=True)
class Units:
    """The removable units of one writer, the layer whose input columns belong to them (see families.py).

    Attributes:
        kind: ``NEURONS`` or ``HEADS``.
        writer: name of the writer relative to the block.
        columns: int64 (units, columns per unit), the writer's columns that belong to each unit.
        slices: all parameters that are cut with the units, the writer's weight included.
    """

    kind: str
    writer: str
    columns: Tensor
    slices: tuple[Slice, ...]

    def __len__(self) -> int:
        """Number of units."""
        return len(self.columns)


@dataclass(frozen=True, slots=True)
class _Attention:
    """Numbers of query heads and of key-value heads, and the width of a head."""

    queries: int
    keys: int
    width: int

    @property
    def shared(self) -> int:
        """Number of query heads for each key-value head."""
        return self.queries // self.keys


def units_of(
    model: PreTrainedModel, blocks: Sequence[nn.Module], kind: str, head_unit: str = GROUP
) -> list[list[Units]]:
    """Return the units of each block. Zeroing a unit's columns of the writer makes its other entries irrelevant.

    Args:
        model: the meta model, its experts as linear layers.
        blocks: its decoder blocks.
        kind: ``NEURONS`` or ``HEADS``.
        head_unit: ``GROUP`` or ``QUERY``. Without grouped-query attention both mean a head.

    Returns:
        For each block the units of its writer, or of one writer for each expert. In a mixture of experts, the list is empty for
        a block without experts, and a shared expert is left out: the config has other fields for their sizes.

    Raises:
        ModelError: the architecture is not known, its config cannot state the smaller size, or a block differs from its family.
    """
    config: Any = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    family = family_of(config.model_type, name)
    if kind == NEURONS:
        cut, expected = family.mlp, width_of(config, family.width)
        heads = None
    else:
        if isinstance(family.attention, str):
            raise ModelError(f"{name} cannot lose heads: {family.attention}")
        cut, heads = family.attention, attention_of(config)
        expected = heads.queries * heads.width
    _check_unshared(blocks, name)
    by_block = []
    for number, block in enumerate(blocks):
        units = []
        for writer in _writers(block, cut.writer):
            what = f"{name}: {writer} of block {number}"
            if _columns(block, writer) != expected:
                raise ModelError(f"{what} has {_columns(block, writer)} columns, but {expected} by the config")
            columns = torch.arange(expected).unsqueeze(1) if heads is None else _query_rows(heads, head_unit)
            slices = _slices(block, writer, cut, columns, heads, head_unit, what)
            units.append(Units(kind, writer, columns, slices))
        by_block.append(units)
    if not any(by_block):
        raise ModelError(f"{name} has no layer {cut.writer}, so no {kind} can be removed")
    return by_block


def attention_of(config: Any) -> _Attention:
    """Return the numbers and the width of the heads that a text model's config states."""
    queries = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or queries
    width = getattr(config, "head_dim", None) or config.hidden_size // queries
    return _Attention(queries, keys, width)


def width_of(config: Any, field: str) -> int:
    """Return the number of neurons that a field of a text model's config states."""
    width = getattr(config, field)
    return 4 * config.hidden_size if width is None else width  # None in GPT-2 means the default


def _writers(block: nn.Module, pattern: str) -> Iterator[str]:
    expression = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
    return (name for name, _ in block.named_modules() if expression.fullmatch(name))


def _transposed(layer: nn.Module) -> bool:
    """Whether a layer stores its weight as (inputs, outputs), like GPT-2's Conv1D."""
    return not isinstance(layer, nn.Linear)


def _columns(block: nn.Module, writer: str) -> int:
    layer = block.get_submodule(writer)
    return layer.get_parameter("weight").shape[0 if _transposed(layer) else 1]


def _slices(
    block: nn.Module, writer: str, cut: Cut, columns: Tensor, heads: _Attention | None, head_unit: str, what: str
) -> tuple[Slice, ...]:
    """Return the parameters that are cut with a writer's columns.

    Raises:
        ModelError: the writer's module has a parameter that its family lacks, or a maker has another number of rows.
    """
    prefix = writer.rpartition(".")[0]
    dot = f"{prefix}." if prefix else ""
    slices = [Slice(f"{writer}.weight", 0 if _transposed(block.get_submodule(writer)) else 1, columns)]
    known = {f"{writer}.weight", f"{writer}.bias", *(f"{dot}{name}" for name in cut.uncut)}
    for maker, matrices in cut.makers:
        layer = block.get_submodule(f"{dot}{maker}")
        indices, start = [], 0
        for matrix in matrices:
            index, rows = _matrix_rows(matrix, columns, heads, head_unit)
            indices += [] if index is None else [index + start]
            start += rows
        weight = layer.get_parameter("weight")
        axis = 1 if _transposed(layer) else 0
        if weight.shape[axis] != start:
            raise ModelError(f"{what}: {maker} has {weight.shape[axis]} rows, but {start} by the config")
        known |= {f"{dot}{maker}.{name}" for name, _ in layer.named_parameters()}
        if indices:
            index = torch.cat(indices, 1)
            slices.append(Slice(f"{dot}{maker}.weight", axis, index))
            if getattr(layer, "bias", None) is not None:
                slices.append(Slice(f"{dot}{maker}.bias", 0, index))
    if prefix:
        own = {f"{dot}{name}" for name, _ in block.get_submodule(prefix).named_parameters()}
        if strange := sorted(own - known):
            raise ModelError(f"{what}: it is not known how {strange[0]} depends on the units")
    return tuple(slices)


def _matrix_rows(matrix: str, columns: Tensor, heads: _Attention | None, head_unit: str) -> tuple[Tensor | None, int]:
    """Return the rows of a maker's matrix that belong to each unit (None if no row does), and its number of rows."""
    if heads is None:
        return columns, len(columns)
    if matrix == "q":
        return columns, heads.queries * heads.width
    rows = heads.keys * heads.width
    if head_unit == QUERY and heads.shared > 1:
        return None, rows
    return torch.arange(rows).view(heads.keys, heads.width), rows


def _query_rows(heads: _Attention, head_unit: str) -> Tensor:
    """Return the rows of q that belong to each unit. They are also the columns of the writer."""
    rows = torch.arange(heads.queries * heads.width).view(heads.keys, heads.shared, heads.width)
    if head_unit == QUERY and heads.shared > 1:
        rows = rows.transpose(0, 1)
    return rows.flatten(1)


def _check_unshared(blocks: Sequence[nn.Module], name: str) -> None:
    """Raise ModelError if blocks share a parameter, since it cannot be cut for one of them alone."""
    seen: dict[int, str] = {}
    for number, block in enumerate(blocks):
        for key, parameter in block.named_parameters(remove_duplicate=False):
            first = seen.setdefault(id(parameter), f"{number}.{key}")
            if first != f"{number}.{key}":
                raise ModelError(
                    f"{name}: the blocks share a parameter ({first} and {number}.{key}), so it cannot be cut"
                )
