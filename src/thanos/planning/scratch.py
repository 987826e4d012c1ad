"""Stand-ins of a trial for the output, the journal and the meter of a run; the speed of the disk and of checks."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from thanos.checkpoint.entries import count_zeros
from thanos.checkpoint.in_memory import raw_bytes
from thanos.engine.records import BlockRecord
from thanos.engine.stream_states import StreamStates
from thanos.errors import NumericsError
from thanos.planning.kinds import Job
from thanos.system.files import write_at
from thanos.system.memory import device_memory, host_bytes, host_peak_bytes
from thanos.system.meter import PhaseMeter

_COPIED_BYTES = 16 << 20
"""Bytes that are copied to measure the disk."""

_SCAN_SECONDS = 0.2
"""Seconds for which tensors that are not pruned are scanned, to measure the rate."""


_MEMORY = ("host", "device")
"""Storage tiers in memory, in the order of the numbers of :attr:`TrialMeter.growth`."""


class TrialMeter(PhaseMeter):
    """A meter that also measures the processor's seconds of each phase, and its memory without what is kept of the sequences.

    Attributes:
        busy: phase → seconds of the processor, all threads together.
        growth: phase → peak growth of host and device memory in bytes, since the meter was made, without the hidden states and
            the inputs of branches that exist at the end of the phase.
        with_branches: phases at whose end inputs of branches are kept.
        streams: the streams of the trial's sequences; None before they exist.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.busy: dict[str, float] = {}
        self.growth: dict[str, tuple[int, int]] = {}
        self.with_branches: set[str] = set()
        self.streams: StreamStates | None = None
        self._before = host_bytes(), device_memory(device)[0] if device.type == "cuda" else 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """See :meth:`PhaseMeter.phase`."""
        began = time.process_time()
        with super().phase(name):
            yield
        self.busy[name] = self.busy.get(name, 0.0) + time.process_time() - began

    def _stop(self) -> None:
        super()._stop()
        name, streams = self._entered[-1], self.streams
        device = device_memory(self._device)[1] if self._device.type == "cuda" else 0
        grown = [host_peak_bytes() - self._before[0], device - self._before[1]]
        if streams is not None and streams.tier in _MEMORY:
            grown[_MEMORY.index(streams.tier)] -= streams.state_bytes + streams.kept_bytes
        host, device = (max(pair) for pair in zip(self.growth.get(name, (0, 0)), grown, strict=True))
        self.growth[name] = host, device
        if streams is not None and streams.kept_bytes:
            self.with_branches.add(name)

    def forget(self, *names: str) -> None:
        """Discard the seconds and peaks of phases."""
        for name in names:
            self.with_branches.discard(name)
            for known in (self.busy, self.growth, self._seconds, self._host, self._on_device):
                known.pop(name, None)


class Scratch:
    """Replaces the output and the journal of a run: writes the bytes of tensors to a file without a name.

    Args:
        folder: existing folder on the output's disk.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        self._end = 0
        self.meter: PhaseMeter | None = None
        self.finished: dict[int | None, BlockRecord] = {}

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor's bytes and compute their checksum, as the writer of a run does."""
        del name
        data = raw_bytes(tensor.cpu())
        self.append(data)
        hashlib.blake2b(data, digest_size=16)

    def removes(self, layer: str, units: Sequence[int]) -> None:
        """Do nothing: a trial writes tensors of full size."""

    def append(self, data: memoryview) -> None:
        """Write bytes after those since the last :meth:`sync`."""
        write_at(self._file.fileno(), data, self._end)
        self._end += len(data)

    def record(self, record: BlockRecord, written: Sequence[str]) -> None:
        """Force a block's tensors to the disk, as the journal of a run does."""
        assert self.meter is not None
        with self.meter.phase("write"):
            self.sync()

    def sync(self) -> None:
        """Force all bytes to the disk. Later bytes replace them."""
        os.fsync(self._file.fileno())
        self._end = 0

    def close(self) -> None:
        """Delete the file."""
        self._file.close()


def copy_seconds(job: Job, scratch: Scratch) -> float:
    """Return the seconds per byte of a tensor that is copied to the output and forced to the disk."""
    done, began = 0, time.perf_counter()
    for key in job.untouched():
        for span in job.prepared.opened.checkpoint.raw_spans(key):
            scratch.append(span)
            done += len(span)
            if done >= _COPIED_BYTES:
                break
        if done >= _COPIED_BYTES:
            break
    scratch.sync()
    return (time.perf_counter() - began) / max(1, done)


def scan_seconds(job: Job) -> float:
    """Return the seconds per byte of the check of tensors that are not pruned, measured on the largest of them."""
    seen, began = 0, time.perf_counter()
    for key in job.untouched():
        for chunk in job.prepared.opened.checkpoint.chunks(key):
            with suppress(NumericsError):
                count_zeros(key, chunk)
            seen += chunk.nbytes
        if time.perf_counter() - began > _SCAN_SECONDS:
            break
    return (time.perf_counter() - began) / max(1, seen)
