"""What lies where in safetensors files: names, dtypes, offsets, and the index that names the shards."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from thanos.errors import ModelError

DEFAULT_SHARD_BYTES = 50 * 10**9
"""Largest shard that we plan for a model that came without shards; transformers' own default."""


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
"""The format's other dtypes: what a header names besides is damage."""


CHUNK_ENTRIES = 1 << 24
"""Entries that are looked at, or copied, at once: 32 MiB of bfloat16."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        shard: file name.
        dtype: torch dtype.
        shape: sizes.
        offset: first byte in the file.
        nbytes: length in bytes.
    """

    shard: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """One file of a checkpoint: its name, the bytes before the tensors, and its total size in bytes."""

    name: str
    header: bytes
    size: int


def split_info(tensors: dict[str, TensorInfo], name: str, pieces: Mapping[str, tuple[int, ...]]) -> None:
    """Replace the entry of a fused tensor by entries of its parts, in place; ``pieces`` maps each part's name to its shape."""
    whole = tensors[name]
    if sum(math.prod(shape) for shape in pieces.values()) != whole.numel:
        raise ModelError(
            f"{name} has shape {list(whole.shape)}, but config.json makes it {len(pieces)} matrices of "
            f"{' and '.join(str(list(shape)) for shape in dict.fromkeys(pieces.values()))}; the config belongs to another "
            "checkpoint"
        )
    del tensors[name]
    offset = whole.offset
    for key, shape in pieces.items():
        nbytes = math.prod(shape) * whole.dtype.itemsize
        tensors[key] = TensorInfo(whole.shard, whole.dtype, tuple(shape), offset, nbytes)
        offset += nbytes


def parse_entry(shard: str, entry: dict[str, Any], base: int) -> TensorInfo:
    """Return what a header says of one tensor; its offsets count from ``base`` bytes into the file.

    Raises:
        ValueError: the entry contradicts itself, or its dtype is not supported.
    """
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype {entry['dtype']} is not supported")
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    first, last = entry["data_offsets"]
    if not all(type(number) is int for number in (*shape, first, last)):
        raise ValueError("sizes and offsets must be whole numbers")
    if min(shape, default=0) < 0 or last - first != math.prod(shape) * dtype.itemsize or first < 0:
        raise ValueError("shape and offsets disagree")
    return TensorInfo(shard, dtype, shape, base + first, last - first)


def plan_layout(file: str, group: dict[str, Tensor]) -> tuple[ShardLayout, dict[str, TensorInfo]]:
    """Return the header of a file that holds a group of tensors, and where each of them lies."""
    # Wider dtypes first keeps every tensor aligned, as the library does.
    names = sorted(group, key=lambda name: (-group[name].dtype.itemsize, name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = group[name]
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    del entries["__metadata__"]
    infos = {name: parse_entry(file, entry, len(header)) for name, entry in entries.items()}
    return ShardLayout(file, header, len(header) + end), infos


def make_index(tensors: Mapping[str, TensorInfo]) -> bytes:
    """Return the text of ``model.safetensors.index.json``."""
    total = sum(info.nbytes for info in tensors.values())
    weight_map = {name: info.shard for name, info in sorted(tensors.items())}
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + os.linesep).encode()


class TensorSource(Protocol):
    """Anything that hands out a checkpoint's tensors by name."""

    @property
    def tensors(self) -> Mapping[str, Any]:
        """What is known of each tensor by name, such as its ``dtype``."""
        ...

    def read(self, name: str) -> Tensor:
        """Return the tensor on the CPU; it may share memory with the source and must not be modified."""
        ...

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Yield the tensor's entries in order, in flat pieces that need not be in memory together."""
        ...
