"""A checkpoint whose tensors are in memory: transformers had to convert them, or the user has loaded the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from thanos.checkpoint.layout import CHUNK_ENTRIES, DEFAULT_SHARD_BYTES, Layout, TensorInfo, TensorSpec, plan_layout


class LoadedCheckpoint:
    """A :class:`~thanos.checkpoint.layout.Checkpoint` of tensors in memory.

    Args:
        state: name → tensor; only one of several tensors that share memory.
        max_shard_bytes: see :func:`~thanos.checkpoint.layout.plan_layout`.
    """

    def __init__(self, state: Mapping[str, Tensor], max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
        self._state = dict(state)
        specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
        self.layout: Layout = plan_layout(specs, max_shard_bytes)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name → dtype, shape, and bytes in the planned files."""
        return self.layout.tensors

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU. There it shares memory with the model that it came from: do not modify it."""
        return self._state[name].detach().cpu()

    def assign(self, name: str, value: Tensor) -> None:
        """Copy values into a tensor, and so into the model that it came from."""
        with torch.no_grad():
            self._state[name].copy_(value)

    def entries(self, name: str, first: int, count: int) -> Tensor:
        """Return consecutive entries of a tensor, flat; a view of its memory where that is contiguous."""
        return self._state[name].detach().reshape(-1)[first : first + count].cpu()

    def chunks(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor's entries in order, in flat chunks."""
        for chunk in self._state[name].detach().reshape(-1).split(CHUNK_ENTRIES):
            yield chunk.cpu()

    def raw_spans(self, name: str) -> Iterator[memoryview]:
        """Yield a tensor's bytes in order, chunk by chunk."""
        for chunk in self.chunks(name):
            yield raw_bytes(chunk)

    def split(self, name: str, parts: Mapping[str, tuple[int, ...]]) -> None:
        """As :meth:`Checkpoint.split <thanos.checkpoint.layout.Checkpoint.split>`. The parts share the tensor's memory."""
        self.layout.split(name, parts)
        values = self._state.pop(name).detach().reshape(-1).split([math.prod(shape) for shape in parts.values()])
        self._state |= {key: value.view(parts[key]) for key, value in zip(parts, values, strict=True)}


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return a CPU tensor's bytes as safetensors stores them; a view of its memory where that is contiguous."""
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
