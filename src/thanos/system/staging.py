"""Copies between host and device through pinned memory, at the bus's full speed, and without holding up other streams.

A copy from or to ordinary memory goes at a fraction of that speed, and the driver keeps everybody else waiting meanwhile.
"""

from __future__ import annotations

from itertools import cycle
from typing import Any

import torch
from torch import Tensor

PIECE_BYTES = 16 << 20
"""Bytes of each of the two buffers: milliseconds of copying, beside which starting a copy is nothing."""


class Staging:
    """Two pinned buffers, made when they are first needed; while one is on its way, the other is filled or emptied.

    Copies run on the stream that is current for the device. One thread at a time.

    Args:
        device: at the other end. For the CPU all is the same but for the pinning.
        piece_bytes: size of a buffer, a multiple of eight.
    """

    def __init__(self, device: torch.device, piece_bytes: int = PIECE_BYTES) -> None:
        self._device, self._size = device, piece_bytes
        self._buffers: list[Tensor] = []
        self._ended: list[Any] = [None, None]  # CUDA events: the last copy from or to each buffer
        self._turns = cycle((0, 1))

    def fetch(self, tensor: Tensor) -> Tensor:
        """Return a contiguous copy on the host; it is complete."""
        result = torch.empty(tensor.shape, dtype=tensor.dtype)
        coming: tuple[int, Tensor, Tensor] | None = None
        for source, target in zip(self._pieces(tensor), self._pieces(result), strict=True):
            turn, buffer = self._next(source)
            buffer.copy_(source, non_blocking=True)
            self._mark(turn)
            if coming is not None:
                self._take(*coming)
            coming = turn, buffer, target
        if coming is not None:
            self._take(*coming)
        return result

    def fill(self, place: Tensor, values: Tensor) -> None:
        """Begin to copy host values to a place on the device, both flat; :meth:`wait` before the place is used."""
        for target, source in zip(self._pieces(place), values.split(self._count(place)), strict=True):
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

    def _pieces(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.reshape(-1).split(self._count(tensor))

    def _next(self, like: Tensor) -> tuple[int, Tensor]:
        """Return the buffer whose turn it is, as a tensor of the same length and dtype; nothing is copied there any more."""
        if not self._buffers:
            with torch.inference_mode(False):  # made in that mode, it could not be written to outside
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
