"""The interface between the sources of tensors and the files that are written.

A :class:`Checkpoint` is a source: it returns tensors by name. A :class:`Layout` gives each tensor its output file and bytes. It
mirrors the input's files (``checkpoint.layout``), or is planned for tensors of other names, shapes and dtypes
(:func:`plan_layout`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from thanos.checkpoint.weight_files import SINGLE_NAME
from thanos.errors import ModelError

DEFAULT_SHARD_BYTES = 50 * 10**9
"""Bytes of the largest shard that is planned; transformers' own default."""


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


UNSUPPORTED = ("F8_E8M0", "F6_E2M3", "F6_E3M2", "F4")
"""The format's other dtypes. Any name that is in neither list means a damaged header."""


CHUNK_ENTRIES = 1 << 24
"""Most entries of a chunk, the part of a tensor that is read, checked or copied at once."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The dtype and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class TensorInfo(TensorSpec):
    """A tensor, and its location in a file.

    Attributes:
        shard: file name.
        offset: first byte in the file.
    """

    shard: str
    offset: int


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """One file of a checkpoint: its name, the bytes before the tensors, and its total size in bytes."""

    name: str
    header: bytes
    size: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The files of a checkpoint, and the location of each tensor in them.

    Attributes:
        shards: the files, in order.
        tensors: name → :class:`TensorInfo`; only :meth:`split` changes it.
        index: bytes of ``model.safetensors.index.json``; None for a single file.
    """

    shards: tuple[ShardLayout, ...]
    tensors: dict[str, TensorInfo]
    index: bytes | None

    @property
    def nbytes(self) -> int:
        """Bytes of all shards, headers included."""
        return sum(shard.size for shard in self.shards)

    def split(self, name: str, parts: Mapping[str, tuple[int, ...]]) -> None:
        """Replace a fused tensor by its parts, in place. The files, their headers and the index stay the same.

        Args:
            name: name of the fused tensor.
            parts: name → shape of each part, in the order of their bytes.

        Raises:
            ModelError: the parts do not fill the tensor.
        """
        whole = self.tensors[name]
        if sum(math.prod(shape) for shape in parts.values()) != whole.numel:
            raise ModelError(
                f"{name} has shape {list(whole.shape)}, but config.json requires {len(parts)} matrices of "
                f"{' and '.join(str(list(shape)) for shape in dict.fromkeys(parts.values()))}; the config belongs to another "
                "checkpoint"
            )
        del self.tensors[name]
        offset = whole.offset
        for key, shape in parts.items():
            self.tensors[key] = part = TensorInfo(whole.dtype, tuple(shape), whole.shard, offset)
            offset += part.nbytes


def parse_entry(shard: str, entry: dict[str, Any], base: int) -> TensorInfo:
    """Return the tensor that an entry of a header describes.

    Args:
        shard: file name.
        entry: dtype, shape and offsets, as JSON holds them.
        base: byte of the file from which the offsets count.

    Raises:
        ValueError: shape and offsets disagree, or the dtype is not supported.
    """
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype {entry['dtype']} is not supported")
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    first, last = entry["data_offsets"]
    if not all(type(number) is int for number in (*shape, first, last)):
        raise ValueError("sizes and offsets must be whole numbers")
    if min(shape, default=0) < 0 or last - first != math.prod(shape) * dtype.itemsize or first < 0:
        raise ValueError("shape and offsets disagree")
    return TensorInfo(dtype, shape, shard, base + first)


def plan_layout(tensors: Mapping[str, TensorSpec], max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> Layout:
    """Plan the files of a checkpoint, named as transformers names them.

    Args:
        tensors: name → dtype and shape. They fill the shards in this order.
        max_shard_bytes: bytes of tensors above which a shard ends; a larger tensor gets a shard of its own.
    """
    groups: list[dict[str, TensorSpec]] = [{}]
    filled = 0
    for name, spec in tensors.items():
        if groups[-1] and filled + spec.nbytes > max_shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = spec
        filled += spec.nbytes
    if len(groups) == 1:
        return plan_groups({SINGLE_NAME: groups[0]})
    return plan_groups(
        {f"model-{number:05d}-of-{len(groups):05d}.safetensors": group for number, group in enumerate(groups, 1)}
    )


def plan_groups(groups: Mapping[str, Mapping[str, TensorSpec]]) -> Layout:
    """Plan the files of a checkpoint.

    Args:
        groups: file name → name, dtype and shape of each of its tensors. Several files get an index.
    """
    shards, infos = [], dict[str, TensorInfo]()
    for file, group in groups.items():
        shard, placed = _plan_shard(file, group)
        shards.append(shard)
        infos |= placed
    return Layout(tuple(shards), infos, None if len(groups) == 1 else _make_index(infos))


def _plan_shard(file: str, group: Mapping[str, TensorSpec]) -> tuple[ShardLayout, dict[str, TensorInfo]]:
    # Wider dtypes come first, as in the safetensors library. This keeps every tensor aligned.
    names = sorted(group, key=lambda name: (-group[name].dtype.itemsize, name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        spec = group[name]
        entries[name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [end, end + spec.nbytes],
        }
        end += spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    del entries["__metadata__"]
    infos = {name: parse_entry(file, entry, len(header)) for name, entry in entries.items()}
    return ShardLayout(file, header, len(header) + end), infos


def _make_index(tensors: Mapping[str, TensorInfo]) -> bytes:
    """Return the content of ``model.safetensors.index.json``."""
    total = sum(info.nbytes for info in tensors.values())
    weight_map = {name: info.shard for name, info in sorted(tensors.items())}
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + os.linesep).encode()


class TensorSource(Protocol):
    """A source of tensors by name."""

    @property
    def tensors(self) -> Mapping[str, Any]:
        """Name → description of the tensor, such as its ``dtype``."""
        ...

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU. It may share memory with the source: do not modify it."""
        ...

    def chunks(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor's entries in order, in flat chunks of at most ``CHUNK_ENTRIES``.

        With chunks a caller can process a tensor that is larger than the memory.
        """
        ...


class RawSource(Protocol):
    """A source of the bytes of tensors by name."""

    def raw_spans(self, name: str) -> Iterator[memoryview]:
        """Yield a tensor's bytes in order, as safetensors stores them: contiguous, row by row, little-endian.

        Raises:
            ResourceError: the input became shorter while it was read.
        """
        ...


class Checkpoint(TensorSource, RawSource, Protocol):
    """A model's stored tensors: in files, in memory, or computed when they are read."""

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Name → dtype and shape."""
        ...

    def entries(self, name: str, first: int, count: int) -> Tensor:
        """Return ``count`` consecutive entries of a tensor from ``first`` on, flat. Hardly any other entry is read."""
        ...

    @property
    def layout(self) -> Layout:
        """The layout of an output that holds the same tensors: a mirror of the input's files, or planned."""
        ...

    def split(self, name: str, parts: Mapping[str, tuple[int, ...]]) -> None:
        """Treat a fused tensor as several: consecutive ranges of its entries, given by name and shape.

        Raises:
            ModelError: the parts do not fill the tensor.
        """
        ...
