"""Real runs that are killed: the code of the processes that test_kill.py starts.

They are forked from a server that has imported all modules (killed_server.py), so that each starts without delay.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch

import thanos
import thanos.run.prune

torch.set_num_threads(1)  # threads do not survive a fork

TARGETS = ("layers.*", "lm_head")

CALLS = ("fsync", "ftruncate", "mkdir", "open", "posix_fallocate", "pwrite", "rename", "rmdir", "unlink", "write")
"""System calls that change the disk."""


def run(model: Path, out: Path, settings: dict[str, Any], how: dict[str, Any], kill: tuple[str, int] | None) -> None:
    """Prune. With ``kill`` = (kind, number) die by SIGKILL after that many bytes (``bytes``) or calls (``calls``)."""
    if kill is not None:
        (die_after_bytes if kill[0] == "bytes" else die_at_call)(kill[1])
    thanos.prune(model, out, thanos.Recipe(**settings), **how)


def die() -> None:
    """Die as by ``kill -9``: without handlers and without cleaning up."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_after_bytes(count: int) -> None:
    """Die in the middle of a write, after ``count`` bytes: the first bytes of that write are in the file, the rest is not."""
    left, pwrite = [count], os.pwrite

    def limited(descriptor: int, data: Any, offset: int) -> int:
        size = memoryview(data).nbytes
        if size >= left[0]:
            pwrite(descriptor, memoryview(data)[: left[0]], offset)
            die()
        left[0] -= size
        return pwrite(descriptor, data, offset)

    os.pwrite = limited


def die_at_call(number: int) -> None:
    """Die after ``number`` of the system calls that change the disk, before the next one."""
    left = [number]

    def counted(original: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                die()
            return original(*arguments, **named)

        return call

    for name in CALLS:
        if hasattr(os, name):
            setattr(os, name, counted(getattr(os, name)))


def count_calls(model: Path, out: Path, settings: dict[str, Any], file: Path) -> None:
    """Prune without interruption, and write the names of these calls to ``file``, one a line."""
    calls: list[str] = []
    for name in CALLS:
        if hasattr(os, name):
            setattr(os, name, _noted(getattr(os, name), name, calls))
    thanos.prune(model, out, thanos.Recipe(**settings))
    file.write_text("\n".join(calls))


def _noted(original: Any, name: str, calls: list[str]) -> Any:
    def call(*arguments: Any, **named: Any) -> Any:
        calls.append(name)
        return original(*arguments, **named)

    return call
