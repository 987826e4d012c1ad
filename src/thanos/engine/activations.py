"""Storage of the hidden states between two blocks: the device while they fit, else host memory, else a memory-mapped file.

With every storage tier, a batch is copied to the device and the block's output is copied back in the same dtype. So the tier
never changes a result. With host memory and disk, the next batch is copied while the device computes on the current one.
"""

from __future__ import annotations

import math
import mmap
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from thanos.errors import RecipeError, ResourceError
from thanos.system.background import Background
from thanos.system.files import free_disk_bytes, reserve
from thanos.system.memory import free_device_bytes, free_host_bytes
from thanos.system.suggestions import near_tier

Tier = Literal["device", "host", "disk"]
TIERS = ("auto", "device", "host", "disk")

DEVICE_FRACTION = 0.4
"""Fraction of the device's free memory that the activations may use. The rest is for a block, its Hessians and its solves."""

HOST_FRACTION = 0.5
"""Fraction of the host's free memory that the activations may use."""

SPARE_FRACTION = 0.1
"""Fraction of a tier's free memory that one buffer of kept inputs may use (:mod:`thanos.engine.branches`). Usually there
are at most four such buffers: for attention and MLP, in up to two streams."""

_CANNOT_PIN = "CUDA cannot pin the activations in host memory (error {}); use --activations disk"
_CANNOT_UNPIN = "CUDA cannot unpin the activations (error {}), after an earlier error of the device: see that error"


def check_tier(tier: str) -> str:
    """Return ``tier`` if it is one of :data:`TIERS`; else raise RecipeError."""
    if tier not in TIERS:
        raise RecipeError(f"activations must be one of {', '.join(TIERS)}; got {tier!r}{near_tier(tier, TIERS)}")
    return tier


def choose_tier(
    needed: int, device: torch.device, folder: Path, tier: str = "auto", taken: Mapping[str, int] | None = None
) -> Tier:
    """Choose the storage tier of the activations, ``needed`` bytes, by measured free memory.

    On the CPU, device and host memory are the same, and the tier is called ``host``. ``folder`` is on the disk that would hold
    the file. A ``tier`` other than ``auto`` is used without a check of free memory; for the disk, the free space is always
    checked. ``taken`` maps a tier to bytes that are free now, but that other buffers will use. Raises RecipeError for an
    unknown tier, and ResourceError if the disk was chosen and has too little free space.
    """
    before = taken or {}
    check_tier(tier)
    if tier == "auto":
        tiers: tuple[Tier, ...] = ("device", "host") if device.type == "cuda" else ("host",)
        usable = {"device": DEVICE_FRACTION, "host": HOST_FRACTION}
        tier = next((one for one in tiers if needed <= usable[one] * (_free(one, device) - before.get(one, 0))), "disk")
    if tier == "device" and device.type == "cpu":
        tier = "host"
    if tier == "disk" and needed > free_disk_bytes(folder) - before.get("disk", 0):
        raise ResourceError(
            f"the activations need {needed / 1e9:.2f} GB and {folder} has {free_disk_bytes(folder) / 1e9:.2f} GB free; "
            "lower --samples or --sequence-length, or write OUT to another disk"
        )
    return tier  # type: ignore[return-value]


def has_spare_room(tier: str, needed: int, device: torch.device, taken: int = 0) -> bool:
    """Return whether ``needed`` bytes are a small part of a tier's free memory; ``taken`` bytes of it count as used."""
    return needed <= SPARE_FRACTION * (_free(tier, device) - taken)


def _free(tier: str, device: torch.device) -> int:
    return free_device_bytes(device) if tier == "device" else free_host_bytes()


class Activations:
    """Hidden states of all calibration sequences.

    Args:
        samples: number of sequences.
        like: hidden states of one sequence, (1, T, d); gives shape and dtype.
        tier: storage tier; see :func:`choose_tier`.
        device: device on which the blocks run.
        folder: existing folder for the file of tier ``disk``. The file has no name, so it is deleted when the process ends.
        boundary: index of a sequence with which a batch must begin, namely the first held-out one; None for no such limit.

    Raises:
        ResourceError: the disk has no room, or CUDA cannot pin the host memory.
    """

    def __init__(
        self, samples: int, like: Tensor, tier: Tier, device: torch.device, folder: Path, boundary: int | None = None
    ) -> None:
        self.tier: Tier = tier
        self._device, self._boundary = device, boundary
        self._shape, self._dtype = (samples, *like.shape[1:]), like.dtype
        self._pages: mmap.mmap | None = None
        self._pinned = False
        self._copier = Background("thanos-activations", device, limit=3)
        self._store = self._map(folder) if tier == "disk" else self._allocate()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the hidden states."""
        return self._dtype

    @property
    def nbytes(self) -> int:
        """Size of the hidden states of all sequences, in bytes."""
        return math.prod(self._shape) * self._dtype.itemsize

    def batches(self, size: int, first: int = 0, end: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """Yield (index of the batch's first sequence, states (≤ size, T, d) on the device), for sequences [first, end).

        ``end`` None stands for the number of sequences. No batch reaches beyond it, or over the boundary.
        """
        end = self._shape[0] if end is None else end
        boundary = end if self._boundary is None else min(max(first, self._boundary), end)
        parts = pairwise((first, boundary, end))
        spans = [(start, min(size, stop - start)) for begin, stop in parts for start in range(begin, stop, size)]
        coming: Future[tuple[Tensor, Any]] | None = None
        for number, (start, count) in enumerate(spans, 1):
            if self._at_hand:
                yield start, self._read(start, count)
                continue
            coming = coming or self._copier.submit(self._fetch, start, count)
            states = self._ready(coming)
            coming = self._copier.submit(self._fetch, *spans[number]) if number < len(spans) else None
            yield start, states

    def gather(self, batches: Iterable[Sequence[int]]) -> Iterator[Tensor]:
        """Yield the states (B, T, d) of each batch of sequences, in any order, on the device. The next batch is read ahead."""
        if self._at_hand:
            for rows in batches:
                yield torch.stack([self._store[row] for row in rows])  # a list as an index would synchronise
            return
        coming: Future[tuple[Tensor, Any]] | None = None
        for rows in batches:
            before, coming = coming, self._copier.submit(self._fetch_rows, list(rows))
            if before is not None:
                yield self._ready(before)
        if coming is not None:
            yield self._ready(coming)

    def write(self, first: int, states: Tensor) -> None:
        """Store the states (B, T, d) of the sequences from ``first`` on, possibly in the background; see :meth:`flush`."""
        if self._at_hand:
            self._store[first : first + len(states)] = states
        else:
            self._copier.post(self._keep, first, states)

    def flush(self) -> None:
        """Wait until everything passed to :meth:`write` is stored."""
        self._copier.flush()

    def empty_like(self, tier: Tier, folder: Path) -> Activations:
        """Return storage for hidden states of the same shape and dtype, in another tier; its values are undefined."""
        one = torch.empty((), dtype=self._dtype).expand(1, *self._shape[1:])
        return Activations(self._shape[0], one, tier, self._device, folder, self._boundary)

    def takes(self, states: Tensor) -> bool:
        """Return whether hidden states (B, T, d) have the shape and dtype of those that are stored."""
        return states.shape[1:] == self._shape[1:] and states.dtype == self._dtype

    def fill_from(self, other: Activations) -> None:
        """Copy all hidden states of ``other``."""
        for first, states in other.batches(1):
            self.write(first, states)
        self.flush()

    def close(self) -> None:
        """Free the memory or the file."""
        self._copier.close()
        if self._pinned:
            torch.cuda.synchronize(self._device)
            _check(_cudart().cudaHostUnregister(self._store.data_ptr()), _CANNOT_UNPIN)
            self._pinned = False
        self._store = torch.empty(0)
        self._pages = None

    # --- storage ----------------------------------------------------------------------------------------------------

    @property
    def _at_hand(self) -> bool:
        """Whether blocks can compute on the stored tensor without a copy."""
        return self.tier == "device" or (self.tier == "host" and self._device.type == "cpu")

    def _allocate(self) -> Tensor:
        store = torch.empty(self._shape, dtype=self._dtype, device=self._device if self.tier == "device" else "cpu")
        if self.tier == "host" and self._device.type == "cuda" and store.nbytes:
            # Ordinary memory, pinned afterwards: the allocator of pinned memory would round the size up to a power of two.
            _check(_cudart().cudaHostRegister(store.data_ptr(), store.nbytes, 0), _CANNOT_PIN)
            self._pinned = True
        return store

    def _map(self, folder: Path) -> Tensor:
        with tempfile.TemporaryFile(dir=folder, prefix=".activations-") as file:
            try:
                # Without reserved blocks, a write to the mapped file would kill the process when the disk is full.
                reserve(file.fileno(), self.nbytes)
            except OSError as error:
                raise ResourceError(f"no room on {folder} for {self.nbytes / 1e9:.2f} GB of activations") from error
            self._pages = mmap.mmap(file.fileno(), self.nbytes)
        return torch.frombuffer(self._pages, dtype=self._dtype).view(self._shape)

    def _read(self, first: int, size: int) -> Tensor:
        return self._store[first : first + size]

    def _fetch(self, first: int, size: int) -> tuple[Tensor, Any]:
        """Copy a batch to the device, in the copier's thread and on its stream.

        Return the batch and, on CUDA, the event that marks the end of the copy.
        """
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

    def _fetch_rows(self, rows: list[int]) -> tuple[Tensor, Any]:
        """Copy sequences to the device, like :meth:`_fetch`."""
        if self._device.type == "cpu":
            states, ready = self._store[rows], None
        elif self._pinned:
            states = torch.empty((len(rows), *self._shape[1:]), dtype=self._dtype, device=self._device)
            for state, row in zip(states, rows, strict=True):
                state.copy_(self._store[row], non_blocking=True)
            ready = torch.cuda.current_stream(self._device).record_event()
        else:
            states = self._store[rows].pin_memory().to(self._device, non_blocking=True)
            ready = torch.cuda.current_stream(self._device).record_event()
        for row in rows:
            self._let_go(row, 1)
        return states, ready

    def _ready(self, coming: Future[tuple[Tensor, Any]]) -> Tensor:
        """Return fetched states once their copy is done on this stream."""
        states, ready = coming.result()
        if ready is not None:
            here = torch.cuda.current_stream(self._device)
            here.wait_event(ready)
            # Allocated on the copier's stream: the memory must not be reused before this stream is done with it.
            states.record_stream(here)
        return states

    def _keep(self, first: int, states: Tensor) -> None:
        """Copy a batch back to the store, in the copier's thread; its stream has waited for the batch's kernels."""
        self._store[first : first + len(states)].copy_(states)
        if self._pages is not None:
            self._let_go(first, len(states))

    def _let_go(self, first: int, size: int) -> None:
        """Remove the file's pages of a batch from this process's memory; the kernel keeps or writes them as memory allows."""
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
