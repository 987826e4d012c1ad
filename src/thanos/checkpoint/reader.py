"""Read safetensors checkpoints tensor by tensor. All headers are checked before any tensor is read.

The header (8 bytes of length, then JSON) is parsed here because writing in place needs the offsets, which the safetensors
library does not give. Each tensor is a memory map of its own bytes, which is closed with the tensor. So nothing is read
before it is used, nothing is copied on the way to a device, and no page stays in memory.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thanos.checkpoint.layout import (
    CHUNK_ENTRIES,
    DTYPES,
    UNSUPPORTED,
    Layout,
    ShardLayout,
    TensorInfo,
    parse_entry,
)
from thanos.checkpoint.weight_files import AGAIN, INDEX_NAME, WeightFiles, find_weights, pointer_fault
from thanos.errors import ModelError, ResourceError

_MAX_HEADER = 100_000_000  # the format's own limit

_SPAN_BYTES = 8 << 20
"""Bytes that are read at once when a tensor is copied from file to file."""


class SafetensorsCheckpoint:
    """A :class:`~thanos.checkpoint.layout.Checkpoint` of a folder of safetensors shards.

    Args:
        folder: holds ``model.safetensors``, or shards and ``model.safetensors.index.json``.

    Attributes:
        layout: layout of the files, shards in the index's order.

    Raises:
        ModelError: a file is missing, truncated or corrupt; the message names it. Or see
            :func:`~thanos.checkpoint.weight_files.find_weights`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = find_weights(folder)
        shards: list[ShardLayout] = []
        tensors: dict[str, TensorInfo] = {}
        for name in files.names:
            shard, infos = read_shard(folder / name)
            shards.append(shard)
            for tensor, info in infos.items():
                if tensor in tensors:
                    raise ModelError(
                        f"tensor {tensor} is in both {tensors[tensor].shard} and {name}; save "
                        "the model again, or remove the tensor from one of them"
                    )
                tensors[tensor] = info
        _check_index(folder, files, tensors)
        self.layout: Layout = Layout(tuple(shards), tensors, files.index)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name → dtype, shape, and bytes in the files."""
        return self.layout.tensors

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU, mapped from the file. Changing the tensor never changes the file.

        Raises:
            ModelError: the file became shorter since it was checked.
        """
        info = self.tensors[name]
        return read_tensor(self.folder / info.shard, info)

    def chunks(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor's entries in order, in flat chunks. Each is mapped alone, so it leaves memory when it is dropped."""
        entries = self.tensors[name].numel
        for first in range(0, entries, CHUNK_ENTRIES):
            yield self.entries(name, first, min(CHUNK_ENTRIES, entries - first))

    def entries(self, name: str, first: int, count: int) -> Tensor:
        """Return consecutive entries of a tensor, flat, mapped from the file."""
        info = self.tensors[name]
        part = replace(info, shape=(count,), offset=info.offset + first * info.dtype.itemsize)
        return read_tensor(self.folder / info.shard, part)

    def raw_spans(self, name: str) -> Iterator[memoryview]:
        """Yield a tensor's bytes in order, as the file holds them.

        Raises:
            ResourceError: the file became shorter since it was checked.
        """
        info = self.tensors[name]
        path, left = self.folder / info.shard, info.nbytes
        with path.open("rb", buffering=0) as file:
            file.seek(info.offset)
            while left:
                span = file.read(min(_SPAN_BYTES, left))
                if not span:
                    raise ResourceError(
                        f"{path} became shorter while it was read; do not change the input during a run"
                    )
                left -= len(span)
                yield memoryview(span)

    def split(self, name: str, parts: Mapping[str, tuple[int, ...]]) -> None:
        """As :meth:`Checkpoint.split <thanos.checkpoint.layout.Checkpoint.split>`. The file stays as it is."""
        self.layout.split(name, parts)


def _check_index(folder: Path, files: WeightFiles, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse an index that names another file for a tensor than the one that holds it."""
    for tensor, name in files.shard_of.items():
        stored = tensors.get(tensor)
        if stored is None:
            raise ModelError(f"{folder / INDEX_NAME} says that {tensor} is in {name}, but it is not; {AGAIN}")
        if stored.shard != name:
            raise ModelError(
                f"{folder / INDEX_NAME} says that {tensor} is in {name}, but it is in {stored.shard}; correct the index, or "
                "save the model again"
            )


def read_tensor(path: Path, info: TensorInfo) -> Tensor:
    """Map one tensor of a safetensors file into memory. The mapping is private and lives as long as the tensor.

    Raises:
        ModelError: the file ends in the middle of the tensor.
    """
    if not info.nbytes:
        return torch.empty(info.shape, dtype=info.dtype)
    start = info.offset - info.offset % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < info.offset + info.nbytes:  # access beyond the end would kill the process
            raise ModelError(f"{path} ends in the middle of a tensor; {AGAIN}")
        pages = mmap.mmap(file.fileno(), info.offset - start + info.nbytes, access=mmap.ACCESS_COPY, offset=start)
    data = torch.frombuffer(pages, dtype=torch.uint8, offset=info.offset - start, count=info.nbytes)
    if info.offset % info.dtype.itemsize:
        data = data.clone()  # the format does not promise that a tensor is aligned
    return data.view(info.dtype).reshape(info.shape)


def read_shard(path: Path) -> tuple[ShardLayout, dict[str, TensorInfo]]:
    """Return what the header of a file says, after checking it.

    Raises:
        ModelError: the file is missing or truncated, or see :func:`parse_shard`.
    """
    if not path.is_file():
        raise ModelError(f"{path} is missing, though the index names it; {AGAIN}")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(_MAX_HEADER, size - 8):
            wrong = f"{path} is truncated or not a safetensors file ({size} bytes); {AGAIN}"
            raise ModelError(pointer_fault(path) or wrong)
        return parse_shard(path, start + file.read(length), size)


def parse_shard(path: Path, header: bytes, size: int | None = None) -> tuple[ShardLayout, dict[str, TensorInfo]]:
    """Check the header of a shard; return the layout of the shard, and its tensors by name.

    Args:
        path: path of the shard, for messages; its last part becomes the shard's name.
        header: all bytes before the tensors: 8 bytes of length, then JSON of that length.
        size: bytes of the file; None if there is none, and the header alone decides.

    Raises:
        ModelError: the header is corrupt, the tensors overlap or leave gaps, or the file has another size.
    """
    length = len(header) - 8
    try:
        entries: dict[str, Any] = json.loads(header[8:])
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            if entry["dtype"] in UNSUPPORTED:
                raise ModelError(
                    f"{path}: tensor {name} is {entry['dtype']}, which is not supported, only {', '.join(DTYPES)}; give the "
                    "model before quantisation, or save it in another dtype"
                )
        infos = {name: parse_entry(path.name, entry, 8 + length) for name, entry in entries.items()}
    except ModelError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} has a corrupt header ({error}); {AGAIN}") from error
    end = 8 + length
    for name, info in sorted(infos.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != end:
            raise ModelError(f"{path} has a corrupt header (a gap or overlap at {name}); {AGAIN}")
        end += info.nbytes
    if size is not None and end != size:
        raise ModelError(f"{path} is {'truncated' if size < end else 'too long'}: {size} bytes, not {end}; {AGAIN}")
    return ShardLayout(path.name, header, end), infos
