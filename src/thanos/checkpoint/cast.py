"""A checkpoint in another floating-point dtype than its source, converted when it is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from thanos.checkpoint.in_memory import raw_bytes
from thanos.checkpoint.layout import Checkpoint, Layout, TensorInfo, TensorSpec, plan_groups
from thanos.errors import NumericsError


def in_dtype(source: Checkpoint, dtype: torch.dtype | None) -> Checkpoint:
    """Return a checkpoint's tensors in another dtype, or the checkpoint itself if nothing has to change.

    Tensors of integers and of 8-bit numbers are unchanged. Each file keeps its name and its tensors.

    Args:
        source: the checkpoint, before any tensor was split.
        dtype: dtype of the floating-point tensors; None for the dtypes of the source.
    """
    if dtype is None or not any(_changes(info, dtype) for info in source.tensors.values()):
        return source
    return _CastCheckpoint(source, dtype)


def _changes(info: TensorSpec, dtype: torch.dtype) -> bool:
    return info.dtype != dtype and info.dtype.is_floating_point and info.dtype.itemsize > 1


class _CastCheckpoint:
    """A :class:`~thanos.checkpoint.layout.Checkpoint`; see :func:`in_dtype`."""

    def __init__(self, source: Checkpoint, dtype: torch.dtype) -> None:
        self._source, self._dtype = source, dtype
        specs: dict[str, dict[str, TensorSpec]] = {shard.name: {} for shard in source.layout.shards}
        for name, info in source.layout.tensors.items():
            specs[info.shard][name] = TensorSpec(dtype if _changes(info, dtype) else info.dtype, info.shape)
        self.layout: Layout = plan_groups(specs)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name → dtype, shape, and bytes in the planned files."""
        return self.layout.tensors

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU, converted."""
        return self._cast(name, self._source.read(name))

    def entries(self, name: str, first: int, count: int) -> Tensor:
        """Return consecutive entries of a tensor, flat and converted."""
        return self._cast(name, self._source.entries(name, first, count))

    def chunks(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor's entries in order, in the source's chunks, converted."""
        for chunk in self._source.chunks(name):
            yield self._cast(name, chunk)

    def raw_spans(self, name: str) -> Iterator[memoryview]:
        """Yield a tensor's bytes in order, chunk by chunk."""
        for chunk in self.chunks(name):
            yield raw_bytes(chunk)

    def split(self, name: str, parts: Mapping[str, tuple[int, ...]]) -> None:
        """As :meth:`Checkpoint.split <thanos.checkpoint.layout.Checkpoint.split>`, in the source too."""
        self._source.split(name, parts)
        self.layout.split(name, parts)

    def _cast(self, name: str, part: Tensor) -> Tensor:
        """Convert a part of a tensor.

        Raises:
            NumericsError: a finite number is too large for the dtype.
        """
        converted = part.to(self.tensors[name].dtype)
        if converted.dtype == torch.float16 and part.dtype != torch.float16:  # which ends at 65504
            lost = converted.isinf() & part.isfinite()
            if bool(lost.any()):
                raise NumericsError(
                    f"{name} holds {float(part[lost].abs().max()):.3g}, which is beyond float16; choose another "
                    "--output-dtype: bfloat16 or float32"
                )
        return converted
