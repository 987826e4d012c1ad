"""Seconds and peak memory of each phase of a run."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from thanos.report import PhaseRecord

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PhaseMeter:
    """Adds up seconds and takes the peak of memory, phase by phase. A phase may be entered many times, but not nested.

    On Linux the kernel's peak of resident memory is reset at the start of a phase. Where it cannot be reset, a phase's host
    peak is that of the process so far.

    Args:
        device: synchronised at the boundaries where it is a CUDA device, so that work is charged to its own phase.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self._host: dict[str, int] = {}
        self._on_device: dict[str, int] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge what happens inside to a phase."""
        reset_host_peak()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        began = time.perf_counter()
        try:
            yield
        finally:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
                peak = torch.cuda.max_memory_allocated(self._device)
                self._on_device[name] = max(self._on_device.get(name, 0), peak)
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began
            self._host[name] = max(self._host.get(name, 0), host_peak_bytes())

    def records(self) -> dict[str, PhaseRecord]:
        """Return what was measured so far, in the order in which the phases were first entered."""
        return {
            name: PhaseRecord(
                seconds=seconds, host_peak_bytes=self._host[name], device_peak_bytes=self._on_device.get(name)
            )
            for name, seconds in self._seconds.items()
        }


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that the device's or the host's memory is exhausted."""
    said = str(error)  # torch has no exception of its own for the host
    host = any(words in said for words in ("can't allocate memory", "not enough memory", "Cannot allocate memory"))
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (isinstance(error, RuntimeError) and host)


def reset_host_peak() -> None:
    """Make the kernel forget the peak of resident memory so far, where it lets us."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return


def host_peak_bytes() -> int:
    """Return the peak of this process's resident memory, in bytes."""
    found = _status("VmHWM")
    if found is not None:
        return found
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def host_bytes() -> int:
    """Return this process's resident memory now, in bytes; its peak where the system does not tell."""
    return _status("VmRSS") or host_peak_bytes()


def _status(field: str) -> int | None:
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
