"""Memory of the host and of CUDA devices: in use, peak and free."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path
from typing import NamedTuple

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


_STATUS_BYTES = 1 << 14
"""Bytes of one read. The kernel's status file of a process is always smaller, so one read is enough."""


_CACHED_KERNELS = "64"
"""Kernels that oneDNN and ideep each keep, if the user's environment sets no number. Their default is 1024."""

for _variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    # For 16-bit products on a CPU they compile a kernel of about 0.3 MB for each number of rows. Experts get another number of
    # tokens in each batch, so the caches would grow to hundreds of megabytes. They read the variable at the first product.
    os.environ.setdefault(_variable, _CACHED_KERNELS)

_MEMINFO, _CGROUP, _CGROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


class Memory(NamedTuple):
    """Bytes that this process uses now, and its peaks. Without a CUDA device, the device's values are None."""

    host_bytes: int
    host_peak_bytes: int
    device_bytes: int | None = None
    device_peak_bytes: int | None = None


def reset_host_peak() -> None:
    """Reset the kernel's peak of resident memory, if the system allows it."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return


def host_peak_bytes() -> int:
    """Return the peak of this process's resident memory, in bytes."""
    return host_memory()[1]


def host_bytes() -> int:
    """Return this process's resident memory now, in bytes; its peak if the system does not report the current value."""
    return host_memory()[0]


def host_memory() -> tuple[int, int]:
    """Return (:func:`host_bytes`, :func:`host_peak_bytes`) from one reading."""
    known = _status()
    peak = known.get(b"VmHWM")
    if peak is None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return known.get(b"VmRSS") or peak, peak


def _status() -> dict[bytes, int]:
    """Return the kernel's fields on this process's memory, in bytes; empty if the system has none."""
    try:
        # A file object would make twice the system calls.
        descriptor = os.open(_STATUS, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return {}
    try:
        lines = os.read(descriptor, _STATUS_BYTES).splitlines()
    finally:
        os.close(descriptor)
    fields = (line.partition(b":") for line in lines if line.startswith(b"Vm"))
    return {name: int(value.split()[0]) * 1024 for name, _, value in fields}


def device_memory(device: torch.device) -> tuple[int, int]:
    """Return the memory allocated on a CUDA device now, and the peak since its last reset, in bytes."""
    # memory_allocated and max_memory_allocated would each flatten and sort all statistics for one value.
    counted = torch.cuda.memory_stats_as_nested_dict(device).get("allocated_bytes", {}).get("all", {})
    return counted.get("current", 0), counted.get("peak", 0)


def free_device_bytes(device: torch.device) -> int:
    """Return the bytes that this process can still allocate on a CUDA device: unused, or cached by torch for reuse."""
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reusable


def free_host_bytes() -> int:
    """Return the bytes of host memory that this process can still use: the least that the system or a control group allows."""
    found = [_meminfo("MemAvailable"), *(_group_free(folder) for folder in _control_groups())]
    known = [value for value in found if value is not None]
    if known:
        return max(0, min(known))
    # macOS: all physical memory; the exact value needs another package.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def release_free_heap() -> None:
    """Return the heap's free pages to the system, if the C library can. Without this, fragmentation grows with each block."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _meminfo(field: str) -> int | None:
    try:
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _control_groups() -> list[Path]:
    """Return the folders of the memory control groups that this process is in, up to the root."""
    try:
        lines = _CGROUP.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers in ("", "memory"):  # version 2 of control groups, version 1
            root = _CGROUPS / controllers
            folder = root / name.lstrip("/")
            found += [path for path in (folder, *folder.parents) if path == root or root in path.parents]
    return found


def _group_free(folder: Path) -> int | None:
    """Return the bytes that a control group still allows; None if it sets no limit, or none that can be read.

    The inactive page cache counts as free, since the kernel drops it first.
    """
    # The files of version 2 of control groups, then those of version 1.
    for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        try:
            allowed = (folder / limit).read_text().strip()
            if allowed == "max":
                return None
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cache = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
            return int(allowed) - int((folder / usage).read_text()) + cache
        except (OSError, ValueError):
            continue
    return None
