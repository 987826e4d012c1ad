"""A checkpoint whose tensors are in memory, because transformers had to convert them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from torch import Tensor

from thanos.checkpoint.layout import (
    CHUNK_ENTRIES,
    DEFAULT_SHARD_BYTES,
    ShardLayout,
    TensorInfo,
    make_index,
    plan_layout,
    split_info,
)
from thanos.checkpoint.reader import SafetensorsCheckpoint
from thanos.checkpoint.weight_files import SINGLE_NAME


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
            layout, infos = plan_layout(file, group)
            self.shards.append(layout)
            self.tensors |= infos
        self.index = None if len(groups) == 1 else make_index(self.tensors)

    def read(self, name: str) -> Tensor:
        """Return one tensor on the CPU; it shares memory with the model it came from and must not be modified."""
        return self._state[name]

    def split(self, name: str, pieces: Mapping[str, tuple[int, ...]]) -> None:
        """As :meth:`SafetensorsCheckpoint.split`."""
        split_info(self.tensors, name, pieces)
        parts = self._state.pop(name).reshape(-1).split([math.prod(shape) for shape in pieces.values()])
        self._state |= {key: part.view(pieces[key]) for key, part in zip(pieces, parts, strict=True)}

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Yield one tensor's entries in order, in flat pieces."""
        yield from self._state[name].reshape(-1).split(CHUNK_ENTRIES)


Checkpoint = SafetensorsCheckpoint | LoadedCheckpoint
