"""Helpers of all benchmarks: a description of the machine, synchronised times, peak memory."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from thanos._version import __version__
from thanos.model.fingerprint import source_commit
from thanos.system.memory import host_peak_bytes, reset_host_peak

T = TypeVar("T")


def machine(device: str) -> dict[str, Any]:
    """Return the environment of a measurement: hardware, versions, commit, date."""
    cuda = torch.device(device).type == "cuda"
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory if cuda else pages,
        "platform": platform.platform(),
        "versions": {"thanos": __version__, "python": platform.python_version(), "torch": torch.__version__},
        "commit": source_commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def synchronize(device: str) -> None:
    """Wait until the device has finished all launched work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


_ENOUGH_SECONDS = 5.0
"""Total seconds after which a measurement is not repeated, since the relative noise of long runs is small."""


def median_seconds(work: Callable[[], Any], *, repeats: int, device: str, warm_up: bool = True) -> float:
    """Return the median seconds of synchronised runs, after one call as a warm-up unless ``warm_up`` is False.

    There are ``repeats`` runs, or fewer if they take more than ``_ENOUGH_SECONDS`` in total.
    """
    if warm_up:
        work()
    seconds: list[float] = []
    while len(seconds) < repeats and sum(seconds) < _ENOUGH_SECONDS:
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def with_peak(work: Callable[[], T], device: str) -> tuple[T, int]:
    """Return the result of ``work`` and its peak memory in bytes.

    On CUDA it is the device memory in addition to what was allocated before; on the CPU the peak of the whole process.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = work()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    reset_host_peak()
    return work(), host_peak_bytes()
