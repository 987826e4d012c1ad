"""Reading safetensors checkpoints tensor by tensor, with every file checked before any work begins.

The header (8 bytes of length, then JSON) is parsed here because writing in place needs the offsets, which the safetensors
library keeps to itself. A tensor is handed out as a memory map of its own bytes, which ends when the tensor does: nothing is
read before it is used, nothing is copied on the way to a device, and no page stays behind.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thanos.errors import ModelError
from thanos.weightfiles import AGAIN, INDEX_NAME, SINGLE_NAME, find_weights

DEFAULT_SHARD_BYTES = 50 * 10**9
"""Largest shard that we plan for a model that came without shards; transformers' own default."""

_DTYPES = {
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
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_UNSUPPORTED = ("F8_E8M0", "F6_E2M3", "F6_E3M2", "F4")
"""The format's other dtypes: what a header names besides is damage."""

_PIECE = 1 << 24
"""Entries that are looked at, or copied, at once: 32 MiB of bfloat16."""

_MAX_HEADER = 100_000_000  # the format's own limit


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


class SafetensorsCheckpoint:
    """A folder of safetensors shards.

    Args:
        folder: holds ``model.safetensors``, or shards and ``model.safetensors.index.json``.

    Attributes:
        shards: the layout of each file, in the index's order.
        tensors: name → :class:`TensorInfo`.
        index: the index file's bytes; None for a single file.

    Raises:
        ModelError: a file is missing, truncated or corrupt, names the file; or see
            :func:`~thanos.weightfiles.find_weights`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = find_weights(folder)
        self.index = files.index
        self.shards: list[ShardLayout] = []
        self.tensors: dict[str, TensorInfo] = {}
        for name in files.names:
            layout, infos = _read_layout(folder / name)
            self.shards.append(layout)
            for tensor, info in infos.items():
                if tensor in self.tensors:
                    raise ModelError(
                        f"tensor {tensor} is in both {self.tensors[tensor].shard} and {name}, and only one can be meant; save "
                        "the model again, or take it out of one"
                    )
                self.tensors[tensor] = info
        for tensor, name in files.shard_of.items():
            there = self.tensors.get(tensor)
            if there is None:
                raise ModelError(f"{folder / INDEX_NAME} says that {tensor} is in {name}, but it is not; {AGAIN}")
            if there.shard != name:
                raise ModelError(
                    f"{folder / INDEX_NAME} says that {tensor} is in {name}, but it is in {there.shard}; correct the index, or "
                    "save the model again"
                )

    def read(self, name: str) -> Tensor:
        """Return one tensor on the CPU, mapped from the file; changing it never changes the file.

        Raises:
            ModelError: the file became shorter since it was checked.
        """
        info = self.tensors[name]
        return read_tensor(self.folder / info.shard, info)

    def split(self, name: str, pieces: Mapping[str, tuple[int, ...]]) -> None:
        """Treat one tensor as several: consecutive runs of its entries, given by name and shape. The file stays as it is.

        Raises:
            ModelError: the pieces do not fill the tensor.
        """
        _split_info(self.tensors, name, pieces)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Yield one tensor's entries in order, in flat pieces, each mapped alone: what was seen leaves memory."""
        info = self.tensors[name]
        for first in range(0, info.numel, _PIECE):
            count, size = min(_PIECE, info.numel - first), info.dtype.itemsize
            part = replace(info, shape=(count,), offset=info.offset + first * size, nbytes=count * size)
            yield read_tensor(self.folder / info.shard, part)


class LoadedCheckpoint:
    """The same interface over tensors in memory: a GGUF that was dequantised, or a checkpoint whose keys were converted.

    Args:
        state: name → CPU tensor; tensors that share memory must be given once.
        max_shard_bytes: size above which the planned output is split.
    """

    def __init__(self, state: Mapping[str, Tensor], max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
        self._state = dict(state)
        groups: list[dict[str, Tensor]] = [{}]
        filled = 0
        for name, tensor in self._state.items():
            if groups[-1] and filled + tensor.nbytes > max_shard_bytes:
                groups.append({})
                filled = 0
            groups[-1][name] = tensor
            filled += tensor.nbytes
        self.shards: list[ShardLayout] = []
        self.tensors: dict[str, TensorInfo] = {}
        for number, group in enumerate(groups, 1):
            file = SINGLE_NAME if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            layout, infos = _plan_layout(file, group)
            self.shards.append(layout)
            self.tensors |= infos
        self.index = None if len(groups) == 1 else _make_index(self.tensors)

    def read(self, name: str) -> Tensor:
        """Return one tensor on the CPU; it shares memory with the model it came from and must not be modified."""
        return self._state[name]

    def split(self, name: str, pieces: Mapping[str, tuple[int, ...]]) -> None:
        """As :meth:`SafetensorsCheckpoint.split`."""
        _split_info(self.tensors, name, pieces)
        parts = self._state.pop(name).reshape(-1).split([math.prod(shape) for shape in pieces.values()])
        self._state |= {key: part.view(pieces[key]) for key, part in zip(pieces, parts, strict=True)}

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Yield one tensor's entries in order, in flat pieces."""
        yield from self._state[name].reshape(-1).split(_PIECE)


Checkpoint = SafetensorsCheckpoint | LoadedCheckpoint


def read_tensor(path: Path, info: TensorInfo) -> Tensor:
    """Map one tensor of a safetensors file into memory, privately; the mapping lives as long as the tensor.

    Raises:
        ModelError: the file ends too early.
    """
    if not info.nbytes:
        return torch.empty(info.shape, dtype=info.dtype)
    start = info.offset - info.offset % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        if (
            os.fstat(file.fileno()).st_size < info.offset + info.nbytes
        ):  # touching what is beyond would kill the process
            raise ModelError(f"{path} ends in the middle of a tensor; {AGAIN}")
        pages = mmap.mmap(file.fileno(), info.offset - start + info.nbytes, access=mmap.ACCESS_COPY, offset=start)
    data = torch.frombuffer(pages, dtype=torch.uint8, offset=info.offset - start, count=info.nbytes)
    if info.offset % info.dtype.itemsize:
        data = data.clone()  # the format does not promise that a tensor is aligned
    return data.view(info.dtype).reshape(info.shape)


def _split_info(tensors: dict[str, TensorInfo], name: str, pieces: Mapping[str, tuple[int, ...]]) -> None:
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


def match_parameters(parameters: set[str], tensors: set[str], base_model_prefix: str) -> dict[str, str] | None:
    """Map parameter names one to one onto a checkpoint's tensor names.

    Names are equal, or differ by the base model's prefix (hub checkpoints of GPT-2 lack ``transformer.``). Tensors that no
    parameter needs, such as buffers or a tied copy, are left over.

    Returns:
        parameter name → tensor name; None where a parameter has no tensor, so that transformers must load the model.
    """
    prefix = f"{base_model_prefix}."
    candidates = (
        {name: name for name in parameters},
        {name: name.removeprefix(prefix) for name in parameters},
        {name: f"{prefix}{name}" for name in parameters},
    )
    for mapping in candidates:
        if set(mapping.values()) <= tensors and len(set(mapping.values())) == len(mapping):
            return mapping
    return None


def _read_layout(path: Path) -> tuple[ShardLayout, dict[str, TensorInfo]]:
    if not path.is_file():
        raise ModelError(f"{path} is missing, though the index names it; {AGAIN}")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(_MAX_HEADER, size - 8):
            raise ModelError(f"{path} is truncated or not a safetensors file ({size} bytes); {AGAIN}")
        header = file.read(length)
    try:
        entries: dict[str, Any] = json.loads(header)
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            if entry["dtype"] in _UNSUPPORTED:
                raise ModelError(
                    f"{path}: tensor {name} is {entry['dtype']}, which is not supported, only {', '.join(_DTYPES)}; give the "
                    "model before quantisation, or save it in another dtype"
                )
        infos = {name: _parse_entry(path.name, entry, 8 + length) for name, entry in entries.items()}
    except ModelError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} has a corrupt header ({error}); {AGAIN}") from error
    end = 8 + length
    for name, info in sorted(infos.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != end:
            raise ModelError(f"{path} has a corrupt header (a gap or overlap at {name}); {AGAIN}")
        end += info.nbytes
    if end != size:
        raise ModelError(f"{path} is {'truncated' if size < end else 'too long'}: {size} bytes, not {end}; {AGAIN}")
    return ShardLayout(path.name, start + header, size), infos


def _parse_entry(shard: str, entry: dict[str, Any], base: int) -> TensorInfo:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"dtype {entry['dtype']} is not supported")
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    first, last = entry["data_offsets"]
    if not all(type(number) is int for number in (*shape, first, last)):
        raise ValueError("sizes and offsets must be whole numbers")
    if min(shape, default=0) < 0 or last - first != math.prod(shape) * dtype.itemsize or first < 0:
        raise ValueError("shape and offsets disagree")
    return TensorInfo(shard, dtype, shape, base + first, last - first)


def _plan_layout(file: str, group: dict[str, Tensor]) -> tuple[ShardLayout, dict[str, TensorInfo]]:
    # Wider dtypes first keeps every tensor aligned, as the library does.
    names = sorted(group, key=lambda name: (-group[name].dtype.itemsize, name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = group[name]
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    del entries["__metadata__"]
    infos = {name: _parse_entry(file, entry, len(header)) for name, entry in entries.items()}
    return ShardLayout(file, header, len(header) + end), infos


def _make_index(tensors: Mapping[str, TensorInfo]) -> bytes:
    total = sum(info.nbytes for info in tensors.values())
    weight_map = {name: info.shard for name, info in sorted(tensors.items())}
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + os.linesep).encode()
