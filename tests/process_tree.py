"""Running processes and their children, read from Linux's /proc."""

from __future__ import annotations

import time
from pathlib import Path

PATIENCE = 120.0
"""Seconds within which a process must end: generous, since the machine may be busy."""


def processes() -> dict[int, int]:
    """Return process id → id of the parent, for every running process except zombies."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        if fields[0] not in "ZX":
            found[int(path.parent.name)] = int(fields[1])
    return found


def offspring(pid: int) -> set[int]:
    """Return the process ids of all descendants of a process."""
    parents, found = processes(), {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def left_of(pids: set[int]) -> set[int]:
    """Wait until the processes end, at most :data:`PATIENCE` seconds; return those that still run."""
    deadline = time.monotonic() + PATIENCE
    while (left := pids & processes().keys()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left
