"""Seconds and peak memory by phase."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from thanos.system.memory import Memory, device_memory, host_memory, host_peak_bytes, reset_host_peak


class PhaseMeter:
    """Measures the total seconds and the memory peak of each phase. A phase may be entered many times.

    Phases may be nested. Seconds and peaks count for the innermost phase alone, so the seconds of all phases add up to the
    total.

    On Linux the kernel's peak of resident memory is reset at the start of a phase. If it cannot be reset, the host peak of a
    phase is the process's peak so far.

    Args:
        device: device of the run. A CUDA device is synchronised at the start and end of a phase, so that its work counts
            for that phase.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self._host: dict[str, int] = {}
        self._on_device: dict[str, int] = {}
        self._entered: list[str] = []
        self._began = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the seconds and the memory peak of the body, and count them for a phase."""
        if self._entered:
            self._stop()
        self._entered.append(name)
        self._start()
        try:
            yield
        finally:
            self._stop()
            self._entered.pop()
            if self._entered:
                self._start()

    def _start(self) -> None:
        reset_host_peak()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        self._began = time.perf_counter()

    def _stop(self) -> None:
        name = self._entered[-1]
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self._on_device[name] = max(self._on_device.get(name, 0), device_memory(self._device)[1])
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - self._began
        self._host[name] = max(self._host.get(name, 0), host_peak_bytes())

    def memory(self) -> Memory:
        """Return host and device memory now, and the peaks so far, over all phases."""
        host, host_peak = host_memory()
        host_peak = max([host_peak, *self._host.values()])
        if self._device.type != "cuda":
            return Memory(host, host_peak)
        device, device_peak = device_memory(self._device)
        return Memory(host, host_peak, device, max([device_peak, *self._on_device.values()]))

    def add(self, records: Mapping[str, PhaseRecord]) -> None:
        """Add the records of an earlier part of the run, before it was resumed."""
        for name, record in records.items():
            self._seconds[name] = self._seconds.get(name, 0.0) + record.seconds
            self._host[name] = max(self._host.get(name, 0), record.host_peak_bytes)
            if record.device_peak_bytes is not None:
                self._on_device[name] = max(self._on_device.get(name, 0), record.device_peak_bytes)

    def records(self) -> dict[str, PhaseRecord]:
        """Return the record of each phase, in the order in which the phases were first entered."""
        return {
            name: PhaseRecord(
                seconds=seconds, host_peak_bytes=self._host[name], device_peak_bytes=self._on_device.get(name)
            )
            for name, seconds in self._seconds.items()
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseRecord:
    """Seconds and memory peaks, in bytes, of one phase. Without a CUDA device, the device's peak is None."""

    seconds: float
    host_peak_bytes: int
    device_peak_bytes: int | None = None
