"""The hidden states between two blocks: on the device while they fit, else in host memory, else in a mapped file.

Wherever they are, a batch comes to the device and its successor goes back in the same dtype, so the place never changes a
result. From host memory and disk the next batch is on its way while this one is computed on.
"""

from __future__ import annotations

import math
import mmap
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from thanos.errors import RecipeError, ResourceError
from thanos.system.background import Background
from thanos.system.files import free_disk_bytes, reserve
from thanos.system.memory import free_device_bytes, free_host_bytes
from thanos.system.suggestions import near_place

Place = Literal["device", "host", "disk"]
PLACES = ("auto", "device", "host", "disk")

DEVICE_SHARE = 0.4
"""Share of the device's free memory that the activations may take: the rest is for a block, its Hessians and its solves."""

HOST_SHARE = 0.5
"""The same of the host's free memory."""

_CANNOT_PIN = "CUDA cannot pin the activations in host memory (error {}); use --activations disk"
_CANNOT_UNPIN = (
    "CUDA cannot let the activations in host memory go (error {}); that follows an earlier error of the device: look for the "
    "one before this"
)


def check_place(asked: str) -> str:
    """Return ``asked`` if it names a place.

    Raises:
        RecipeError: it does not.
    """
    if asked not in PLACES:
        raise RecipeError(f"activations must be one of {', '.join(PLACES)}; got {asked!r}{near_place(asked, PLACES)}")
    return asked


def choose_place(needed: int, device: torch.device, folder: Path, asked: str = "auto") -> Place:
    """Choose where so many bytes of activations are kept, by measured free memory.

    On the CPU the device's memory is the host's, and the place is called ``host``.

    Args:
        needed: bytes of all sequences.
        device: where blocks run.
        folder: on the disk that would hold the file.
        asked: ``auto``, or a place to use without looking at memory.

    Raises:
        ResourceError: not even the disk has room.
    """
    place = check_place(asked)
    if place == "auto":
        if device.type == "cuda" and needed <= DEVICE_SHARE * free_device_bytes(device):
            place = "device"
        else:
            place = "host" if needed <= HOST_SHARE * free_host_bytes() else "disk"
    if place == "device" and device.type == "cpu":
        place = "host"
    if place == "disk" and needed > free_disk_bytes(folder):
        raise ResourceError(
            f"the activations need {needed / 1e9:.2f} GB and {folder} has {free_disk_bytes(folder) / 1e9:.2f} GB free; "
            "lower --samples or --sequence-length, or write OUT to another disk"
        )
    return place  # type: ignore[return-value]


class Activations:
    """Hidden states of all calibration sequences.

    Args:
        samples: number of sequences.
        like: one sequence's states, (1, T, d).
        place: see :func:`choose_place`.
        device: where blocks run.
        folder: an existing folder for the file of place ``disk``. The file has no name: it ends with the process.

    Raises:
        ResourceError: the disk has no room.
    """

    def __init__(self, samples: int, like: Tensor, place: Place, device: torch.device, folder: Path) -> None:
        self.place: Place = place
        self._device = device
        self._shape, self._dtype = (samples, *like.shape[1:]), like.dtype
        self._pages: mmap.mmap | None = None
        self._pinned = False
        self._copier = Background("thanos-activations", device, limit=3)
        self._store = self._map(folder) if place == "disk" else self._allocate()

    @property
    def nbytes(self) -> int:
        """Bytes of all sequences."""
        return math.prod(self._shape) * self._dtype.itemsize

    def batches(self, size: int, first: int = 0) -> Iterator[tuple[int, Tensor]]:
        """Yield (number of the first sequence, states (≤ size, T, d) on the device), from sequence ``first`` on."""
        starts = range(first, self._shape[0], size)
        coming: Future[tuple[Tensor, Any]] | None = None
        for start in starts:
            if self._at_hand:
                yield start, self._read(start, size)
                continue
            coming = coming or self._copier.submit(self._fetch, start, size)
            states, ready = coming.result()
            coming = self._copier.submit(self._fetch, start + size, size) if start + size < self._shape[0] else None
            if ready is not None:
                here = torch.cuda.current_stream(self._device)
                here.wait_event(ready)
                states.record_stream(here)
            yield start, states

    def write(self, first: int, states: Tensor) -> None:
        """Keep the states (B, T, d) of the sequences from ``first`` on."""
        if self._at_hand:
            self._store[first : first + len(states)] = states
        else:
            self._copier.post(self._keep, first, states)

    def flush(self) -> None:
        """Wait until everything handed to :meth:`write` is in its place."""
        self._copier.flush()

    def close(self) -> None:
        """Let the memory or the file go."""
        self._copier.close()
        if self._pinned:
            torch.cuda.synchronize(self._device)
            _check(_cudart().cudaHostUnregister(self._store.data_ptr()), _CANNOT_UNPIN)
            self._pinned = False
        self._store = torch.empty(0)
        self._pages = None

    # --- places -----------------------------------------------------------------------------------------------------

    @property
    def _at_hand(self) -> bool:
        """Whether the store can be computed on without a copy."""
        return self.place == "device" or (self.place == "host" and self._device.type == "cpu")

    def _allocate(self) -> Tensor:
        store = torch.empty(self._shape, dtype=self._dtype, device=self._device if self.place == "device" else "cpu")
        if self.place == "host" and self._device.type == "cuda" and store.nbytes:
            # Registered, not allocated as pinned: the pinned allocator would round the size up to a power of two.
            _check(_cudart().cudaHostRegister(store.data_ptr(), store.nbytes, 0), _CANNOT_PIN)
            self._pinned = True
        return store

    def _map(self, folder: Path) -> Tensor:
        with tempfile.TemporaryFile(dir=folder, prefix=".activations-") as file:
            try:
                reserve(file.fileno(), self.nbytes)  # a write into a hole would kill the process when the disk is full
            except OSError as error:
                raise ResourceError(f"no room on {folder} for {self.nbytes / 1e9:.2f} GB of activations") from error
            self._pages = mmap.mmap(file.fileno(), self.nbytes)
        return torch.frombuffer(self._pages, dtype=self._dtype).view(self._shape)

    def _read(self, first: int, size: int) -> Tensor:
        return self._store[first : first + size]

    def _fetch(self, first: int, size: int) -> tuple[Tensor, Any]:
        """Bring a batch to the device, with the event of its arrival; in the copier's thread, on its stream."""
        states = self._read(first, size)
        if self._device.type == "cpu":
            states = states.clone()
            self._let_go(first, size)
            return states, None
        if not self._pinned:
            states = states.pin_memory()
            self._let_go(first, size)
        states = states.to(self._device, non_blocking=True)
        return states, torch.cuda.current_stream(self._device).record_event()

    def _keep(self, first: int, states: Tensor) -> None:
        """Bring a batch back; in the copier's thread, on its stream, which has waited for the batch's kernels."""
        self._store[first : first + len(states)].copy_(states)
        if self._pages is not None:
            self._let_go(first, len(states))

    def _let_go(self, first: int, size: int) -> None:
        """Take pages of the file out of this process; the kernel keeps or writes them as its memory allows."""
        if self._pages is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        row = self.nbytes // self._shape[0]
        start = first * row // mmap.PAGESIZE * mmap.PAGESIZE
        end = min((first + size) * row, self.nbytes)
        self._pages.madvise(mmap.MADV_DONTNEED, start, end - start)


def _cudart() -> Any:
    return torch.cuda.cudart()


def _check(code: Any, message: str) -> None:
    if int(code) != 0:
        raise ResourceError(message.format(code))
