"""Writing finished tensors to the output in the background, while the next layers are solved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thanos.engine.distributed import World
from thanos.system.background import Background
from thanos.system.staging import Staging

if TYPE_CHECKING:
    from thanos.checkpoint.writer import CheckpointWriter
    from thanos.engine.rank_zero import SharedWriter


class Output:
    """Writes tensors in a background thread, in the order of the calls.

    Args:
        writer: writer of the output.
        world: the processes of the run; only rank 0 writes.
        device: device of the tensors to write.
    """

    def __init__(self, writer: CheckpointWriter | SharedWriter, world: World, device: torch.device) -> None:
        self._writer, self._world = writer, world
        self._thread, self._staging = Background("thanos-writer", device), Staging(device)

    def write(self, key: str, tensor: Tensor) -> None:
        """Begin to write a contiguous tensor, which has its stored dtype, under its name in the checkpoint.

        A later write under the same name replaces it. If a write fails, the next call or :meth:`flush` raises its error.
        """
        self._thread.post(self._write, key, tensor)

    def removes(self, layer: str, units: Sequence[int]) -> None:
        """Note that a layer loses units, before its weight is written; see the writer's method of the same name."""
        self._thread.post(self._writer.removes, layer, units)

    def flush(self) -> None:
        """Wait until all tensors are written; raise the error of a failed write."""
        self._thread.flush()

    def close(self) -> None:
        """End the thread."""
        self._thread.close()

    def _write(self, key: str, tensor: Tensor) -> None:
        if self._world.rank == 0:  # the other ranks write nothing, so they need no copy in host memory
            self._writer.write(key, self._staging.fetch(tensor) if tensor.is_cuda else tensor)
