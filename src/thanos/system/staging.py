"""Copies between host and device through pinned memory, at the bus's full speed, and without blocking other streams.

A copy from or to pageable memory reaches a fraction of that speed, and the driver blocks all other work until it ends.
"""

from __future__ import annotations

from itertools import cycle
from typing import Any

import torch
from torch import Tensor

BUFFER_BYTES = 16 << 20
"""Bytes of each of the two buffers. A copy takes milliseconds, so the microseconds of its launch do not matter."""


class Staging:
    """Two pinned buffers, allocated at their first use. While one is copied over the bus, the host fills or empties the other.

    Copies run on the device's current stream. Only one thread may use an instance at a time.

    Args:
        device: device that the copies go to or come from. For the CPU the buffers are not pinned.
        buffer_bytes: bytes of each buffer, a multiple of eight.
    """

    def __init__(self, device: torch.device, buffer_bytes: int = BUFFER_BYTES) -> None:
        self._device, self._size = device, buffer_bytes
        self._buffers: list[Tensor] = []
        self._ended: list[Any] = [None, None]  # CUDA events: end of each buffer's last copy
        self._turns = cycle((0, 1))

    def fetch(self, tensor: Tensor) -> Tensor:
        """Return a contiguous copy on the host. Waits until the copy has ended."""
        result = torch.empty(tensor.shape, dtype=tensor.dtype)
        # The chunk that the device is copying. It is taken from its buffer after the next copy has been launched.
        coming: tuple[int, Tensor, Tensor] | None = None
        for source, target in zip(self._chunks(tensor), self._chunks(result), strict=True):
            turn, buffer = self._next(source)
            buffer.copy_(source, non_blocking=True)
            self._mark(turn)
            if coming is not None:
                self._take(*coming)
            coming = turn, buffer, target
        if coming is not None:
            self._take(*coming)
        return result

    def fill(self, destination: Tensor, values: Tensor) -> None:
        """Start to copy values from the host to the device, both flat. Call :meth:`wait` before you use the destination."""
        for target, source in zip(self._chunks(destination), values.split(self._count(destination)), strict=True):
            turn, buffer = self._next(target)
            buffer.copy_(source)
            target.copy_(buffer, non_blocking=True)
            self._mark(turn)

    def wait(self) -> None:
        """Wait until every copy has ended."""
        for turn in range(2):
            self._wait(turn)

    def _count(self, like: Tensor) -> int:
        return self._size // like.element_size()

    def _chunks(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.reshape(-1).split(self._count(tensor))

    def _next(self, like: Tensor) -> tuple[int, Tensor]:
        """Wait until the last copy of the next buffer has ended; return its index and a view of it.

        The view is flat, and has the bytes and the dtype of ``like``.
        """
        if not self._buffers:
            with torch.inference_mode(False):  # an inference tensor is read-only outside that mode
                pinned = self._device.type == "cuda"
                self._buffers = [torch.empty(self._size, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        turn = next(self._turns)
        self._wait(turn)
        return turn, self._buffers[turn][: like.nbytes].view(like.dtype)

    def _take(self, turn: int, buffer: Tensor, target: Tensor) -> None:
        self._wait(turn)
        target.copy_(buffer)

    def _mark(self, turn: int) -> None:
        if self._device.type == "cuda":
            self._ended[turn] = torch.cuda.current_stream(self._device).record_event()

    def _wait(self, turn: int) -> None:
        if self._ended[turn] is not None:
            self._ended[turn].synchronize()
            self._ended[turn] = None
