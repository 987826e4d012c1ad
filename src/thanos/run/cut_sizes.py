"""Numbers of parameters and bytes of a model's units and blocks."""

from __future__ import annotations

from collections.abc import Mapping

from thanos.model.layers import find_blocks
from thanos.model.opening import OpenedModel
from thanos.shrink.units import Units


def unit_sizes(opened: OpenedModel, writers: Mapping[str, Units]) -> dict[str, tuple[int, int]]:
    """Return kind → parameters and bytes that are removed if every writer loses one unit."""
    sizes: dict[str, tuple[int, int]] = {}
    for name, units in writers.items():
        block = name.removesuffix(units.writer)
        parameters, size = sizes.get(units.kind, (0, 0))
        for one in units.slices:
            weight = opened.meta_model.get_parameter(f"{block}{one.name}")
            entries = one.index.shape[1] * weight.numel() // weight.shape[one.axis]
            parameters += entries
            size += entries * opened.checkpoint.tensors[opened.key_of[f"{block}{one.name}"]].dtype.itemsize
        sizes[units.kind] = (parameters, size)
    return sizes


def sizes_by_block(opened: OpenedModel) -> list[tuple[int, int]]:
    """Return the parameters and the bytes of each block."""
    name, blocks = find_blocks(opened.meta_model)
    found = []
    for index, block in enumerate(blocks):
        names = [(f"{name}.{index}.{one}", parameter.numel()) for one, parameter in block.named_parameters()]
        size = sum(
            numel * opened.checkpoint.tensors[opened.key_of[one]].dtype.itemsize
            for one, numel in names
            if one in opened.key_of
        )
        found.append((sum(numel for _, numel in names), size))
    return found


def block_parameters(opened: OpenedModel) -> int:
    """Return the number of parameters of all blocks."""
    _, blocks = find_blocks(opened.meta_model)
    return sum(parameter.numel() for block in blocks for parameter in block.parameters())
