"""Write a checkpoint in place, tensor by tensor.

A layout fixes every offset beforehand. So each tensor is written once, and the order does not matter.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from thanos.checkpoint.layout import Layout, RawSource
from thanos.checkpoint.reader import read_tensor
from thanos.checkpoint.weight_files import INDEX_NAME
from thanos.errors import ResourceError
from thanos.system.files import free_disk_bytes, reserve, sync, write_at


class CheckpointWriter:
    """The shards of an output folder.

    Args:
        layout: layout of the output.
        source: source of the bytes of tensors that are never written. It uses the names of the layout.
        folder: an existing folder. The shard files are created at their full size, and the disk reserves room for them. Files
            that an interrupted run left there keep their tensors.
        besides: bytes that others will write to the same disk during the run.

    Raises:
        ResourceError: the disk has too little room.
    """

    def __init__(self, layout: Layout, source: RawSource, folder: Path, *, besides: int = 0) -> None:
        self._layout, self._source, self._folder = layout, source, folder
        self.written: set[str] = set()
        self._checksums: dict[str, str] = {}
        self._unsynced = {shard.name for shard in layout.shards}
        check_room(layout, folder, besides=besides)
        for shard in layout.shards:
            descriptor = os.open(folder / shard.name, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                reserve(descriptor, shard.size)
                write_at(descriptor, memoryview(shard.header), 0)
            finally:
                os.close(descriptor)

    @property
    def files(self) -> set[str]:
        """Names of the shards."""
        return {shard.name for shard in self._layout.shards}

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor.

        Raises:
            ValueError: its shape or dtype is not the layout's.
        """
        info = self._layout.tensors[name]
        if tuple(tensor.shape) != info.shape or tensor.dtype != info.dtype:
            raise ValueError(
                f"{name} is {info.dtype} {info.shape} in the layout, got {tensor.dtype} {tuple(tensor.shape)}"
            )
        data = _bytes_of(tensor)
        with (self._folder / info.shard).open("r+b", buffering=0) as file:
            write_at(file.fileno(), memoryview(data.numpy().data), info.offset)
        self._checksums[name] = _checksum(data)
        self._unsynced.add(info.shard)
        self.written.add(name)

    def write_parts(self, name: str, parts: Iterable[Tensor]) -> None:
        """Write one tensor, given as consecutive parts of its entries; each is dropped when it is written.

        It has no checksum for :meth:`take_checksum`.

        Raises:
            ValueError: a part has another dtype than the layout's, or all of them have another size.
        """
        info = self._layout.tensors[name]
        offset, end = info.offset, info.offset + info.nbytes
        with (self._folder / info.shard).open("r+b", buffering=0) as file:
            for part in parts:
                if part.dtype != info.dtype or offset + part.nbytes > end:  # never into the next tensor
                    raise ValueError(
                        f"{name} is {info.dtype} {info.shape} in the layout, and a part does not fit: {part.dtype}"
                    )
                write_at(file.fileno(), memoryview(_bytes_of(part).numpy().data), offset)
                offset += part.nbytes
                del part  # before the next one is made
        if offset != end:
            raise ValueError(f"{name} has {info.nbytes} bytes in the layout, but its parts have {offset - info.offset}")
        self._unsynced.add(info.shard)
        self.written.add(name)

    def removes(self, layer: str, units: Sequence[int]) -> None:
        """Note that a layer loses units, before its weight is written. An output of full size keeps them, as zeros.

        Args:
            layer: full name of the layer.
            units: indices of the removed units, ascending.
        """

    def read(self, name: str) -> Tensor:
        """Return a tensor that was written."""
        return self._stored(name)

    def checksum(self, name: str) -> str:
        """Return the checksum of a tensor's bytes as they are in the file."""
        return _checksum(self._stored(name).reshape(-1).view(torch.uint8))

    def take_checksum(self, name: str) -> str:
        """Return the checksum that :meth:`write` computed for a tensor, and forget it. Nothing is read."""
        return self._checksums.pop(name)

    def accept(self, name: str) -> None:
        """Count a tensor as written, because an interrupted run wrote it."""
        self.written.add(name)

    def flush(self) -> None:
        """Force all written bytes to the disk."""
        for shard in sorted(self._unsynced):
            sync(self._folder / shard)
        sync(self._folder)
        self._unsynced.clear()

    def finish(self) -> None:
        """Copy the tensors that were not written from the source, write the index, and force everything to the disk.

        Raises:
            ResourceError: the input became shorter during the run.
            ValueError: the source has another number of bytes for a tensor than the layout.
        """
        for name in self._layout.tensors:
            if name not in self.written:
                self._copy(name)
        if self._layout.index is not None:
            (self._folder / INDEX_NAME).write_bytes(self._layout.index)
        for path in self._folder.iterdir():
            sync(path)

    def _stored(self, name: str) -> Tensor:
        info = self._layout.tensors[name]
        return read_tensor(self._folder / info.shard, info)

    def _copy(self, name: str) -> None:
        info = self._layout.tensors[name]
        offset, end = info.offset, info.offset + info.nbytes
        with (self._folder / info.shard).open("r+b", buffering=0) as file:
            for span in self._source.raw_spans(name):
                if offset + len(span) <= end:  # never into the next tensor
                    write_at(file.fileno(), span, offset)
                offset += len(span)
        if offset != end:
            raise ValueError(
                f"{name} has {info.nbytes} bytes in the layout, but {offset - info.offset} in the source; write it"
            )
        self.written.add(name)


def disk_shortage(needed: int, free: int, folder: Path) -> str:
    """Return the error line for a disk with too little room; empty if there is enough."""
    if needed <= free:
        return ""
    return (
        f"disk full: the output needs {needed / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free; "
        "free some space, or write the output to another disk"
    )


def check_room(layout: Layout, folder: Path, *, besides: int = 0) -> None:
    """Refuse a disk without room for an output. Changes nothing.

    Args:
        layout: layout of the output.
        folder: folder of the output; it need not exist. Shards that exist already need no more room.
        besides: bytes that others will write to the same disk.

    Raises:
        ResourceError: says how much is needed and how much is free.
    """
    _check_free(besides + sum(max(0, shard.size - _allocated(folder / shard.name)) for shard in layout.shards), folder)


def check_bytes(weights: int, folder: Path, *, besides: int = 0) -> None:
    """Refuse a disk without room for ``weights`` bytes of shards whose layout is not known yet; see :func:`check_room`."""
    _check_free(besides + max(0, weights - sum(map(_allocated, folder.glob("*.safetensors")))), folder)


def _check_free(needed: int, folder: Path) -> None:
    shortage = disk_shortage(needed, free_disk_bytes(folder), folder.parent)
    if shortage:
        raise ResourceError(shortage)


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _checksum(data: Tensor) -> str:
    return hashlib.blake2b(data.numpy().data, digest_size=16).hexdigest()


def _allocated(path: Path) -> int:
    """Return how much of the disk a file takes already."""
    return path.stat().st_blocks * 512 if path.exists() else 0
