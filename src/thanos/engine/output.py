"""Finished tensors on their way to the output, while the next layers are solved."""

from __future__ import annotations

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
    """Writes tensors in a thread of its own, in the order in which they come.

    Args:
        writer: of the output.
        world: the processes of the run, of which rank 0 alone writes.
        device: where tensors come from.
    """

    def __init__(self, writer: CheckpointWriter | SharedWriter, world: World, device: torch.device) -> None:
        self._writer, self._world = writer, world
        self._thread, self._staging = Background("thanos-writer", device), Staging(device)

    def write(self, key: str, tensor: Tensor) -> None:
        """Begin to write a tensor, contiguous and in its stored dtype, by its name in the checkpoint.

        A tensor that is written again replaces the first. An error of an earlier one is raised here or by :meth:`flush`.
        """
        self._thread.post(self._write, key, tensor)

    def flush(self) -> None:
        """Wait until everything is written."""
        self._thread.flush()

    def close(self) -> None:
        """End the thread."""
        self._thread.close()

    def _write(self, key: str, tensor: Tensor) -> None:
        if self._world.rank == 0:  # the others write nothing, and so need no copy on the host
            self._writer.write(key, self._staging.fetch(tensor) if tensor.is_cuda else tensor)
