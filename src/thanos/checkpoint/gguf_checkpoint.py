"""A checkpoint in GGUF files, whose tensors are dequantised when they are read.

Nothing stays in memory: each read takes the bytes of the rows that it needs from the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from thanos.checkpoint.gguf_header import StoredTensor
from thanos.checkpoint.in_memory import raw_bytes
from thanos.checkpoint.layout import DEFAULT_SHARD_BYTES, Layout, TensorInfo, TensorSpec, plan_layout
from thanos.errors import ModelError, ResourceError

_CHUNK_ENTRIES = 1 << 22
"""Entries that are dequantised at once. The package needs about three times their bytes in float32."""

_RUN_ENTRIES = 4096
"""Entries of a row that is passed to the package. It works on 16 rows at a time, so short rows would take twice as long."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a tensor of a GGUF file, which are consecutive entries of one of the model's tensors.

    A vector in the file counts as rows of one entry.

    Attributes:
        tensor: the tensor that holds the rows.
        first: first row.
        rows: number of rows.
        order: for each row of the model's tensor, its index among the rows of the piece, int64 (rows,); None for the file's
            order.
        shift: added to every entry in float32.
    """

    tensor: StoredTensor
    first: int
    rows: int
    order: np.ndarray | None = None
    shift: float = 0.0

    @property
    def columns(self) -> int:
        """Entries of a row."""
        return self.tensor.shape[-1] if len(self.tensor.shape) > 1 else 1

    @property
    def numel(self) -> int:
        """Number of entries."""
        return self.rows * self.columns

    def read(self, start: int, stop: int) -> np.ndarray:
        """Dequantise rows ``start`` to ``stop`` of the piece, in the model's order; float32, flat.

        Raises:
            ResourceError: the file became shorter since it was opened.
        """
        entries, size = self.tensor.block
        width = self.columns // entries * size  # bytes of a row
        if self.order is None:
            raw = self._bytes(self.first + start, stop - start, width)
        else:  # each row is quantised by itself, so rows can be reordered before they are dequantised
            raw = self._bytes(self.first, self.rows, width)[self.order[start:stop]]
        values = _dequantise(raw.reshape(-1, size), self.tensor.kind, entries)
        return values + np.float32(self.shift) if self.shift else values

    def _bytes(self, first: int, rows: int, width: int) -> np.ndarray:
        path = self.tensor.path
        raw = np.fromfile(path, np.uint8, rows * width, offset=self.tensor.offset + first * width)
        if raw.size != rows * width:
            raise ResourceError(f"{path} became shorter while it was read; do not change the input during a run")
        return raw.reshape(rows, width)


def _dequantise(blocks: np.ndarray, kind: int, entries: int) -> np.ndarray:
    """Return the entries of blocks of bytes (blocks, bytes), float32, flat."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    count, size = blocks.shape
    run = max(1, _RUN_ENTRIES // entries)
    whole = count // run * run
    parts = [
        dequantize(part, GGMLQuantizationType(kind)).reshape(-1)
        for part in (blocks[:whole].reshape(-1, run * size), blocks[whole:].reshape(1, -1))
        if part.size
    ]
    return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, np.float32)])


def check_kind(tensor: StoredTensor) -> None:
    """Check that the gguf package can dequantise a tensor.

    Raises:
        ModelError: it cannot.
    """
    try:
        _dequantise(np.zeros((1, tensor.block[1]), np.uint8), tensor.kind, tensor.block[0])
    except NotImplementedError as error:
        raise ModelError(
            f"{tensor.path} holds tensors of the kind {tensor.kind_name}, which the gguf package cannot read; give a file with "
            "another quantisation, or the model as a folder of safetensors"
        ) from error


class GGUFCheckpoint:
    """A :class:`~thanos.checkpoint.layout.Checkpoint` of float32 tensors that are read from GGUF files.

    Args:
        pieces: name of a tensor in the model → the pieces that hold its entries, in order.
        shapes: name of a tensor in the model → its shape.
        max_shard_bytes: see :func:`~thanos.checkpoint.layout.plan_layout`.

    Raises:
        ValueError: the pieces of a tensor do not fill it.
    """

    def __init__(
        self,
        pieces: Mapping[str, Sequence[Piece]],
        shapes: Mapping[str, tuple[int, ...]],
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    ) -> None:
        self._pieces = dict(pieces)
        for name, shape in shapes.items():
            if sum(piece.numel for piece in self._pieces[name]) != math.prod(shape):
                raise ValueError(f"{name} does not have the entries of {list(shape)}")
        specs = {name: TensorSpec(torch.float32, tuple(shape)) for name, shape in shapes.items()}
        self.layout: Layout = plan_layout(specs, max_shard_bytes)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name → dtype, shape, and bytes in the planned files."""
        return self.layout.tensors

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU, dequantised now."""
        info = self.tensors[name]
        whole = torch.empty(info.numel, dtype=info.dtype)
        done = 0
        for chunk in self.chunks(name):
            whole[done : done + len(chunk)] = chunk
            done += len(chunk)
        return whole.view(info.shape)

    def entries(self, name: str, first: int, count: int) -> Tensor:
        """Return consecutive entries of a tensor, flat. Only the rows that hold them are dequantised."""
        parts, start = [], 0
        for piece in self._pieces[name]:
            low, high = max(first - start, 0), min(first + count - start, piece.numel)
            if low < high:
                row = low // piece.columns
                values = piece.read(row, -(-high // piece.columns))
                parts.append(torch.from_numpy(values[low - row * piece.columns : high - row * piece.columns]))
            start += piece.numel
        return torch.cat(parts) if parts else torch.empty(0)

    def chunks(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor's entries in order, in flat chunks of whole rows."""
        for piece in self._pieces[name]:
            rows = max(1, _CHUNK_ENTRIES // piece.columns)
            for start in range(0, piece.rows, rows):
                yield torch.from_numpy(piece.read(start, min(start + rows, piece.rows)))

    def raw_spans(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of a tensor's float32 entries in order, chunk by chunk."""
        for chunk in self.chunks(name):
            yield raw_bytes(chunk)

    def split(self, name: str, parts: Mapping[str, tuple[int, ...]]) -> None:
        """As :meth:`Checkpoint.split <thanos.checkpoint.layout.Checkpoint.split>`. A part must begin where a piece begins."""
        self.layout.split(name, parts)
        pieces = iter(self._pieces.pop(name))
        for key, shape in parts.items():
            own, left = [], math.prod(shape)
            while left > 0:
                own.append(next(pieces))
                left -= own[-1].numel
            assert left == 0, f"{key} ends inside a piece of {name}"
            self._pieces[key] = own
