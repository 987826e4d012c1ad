"""Leaving the process group of a run. No thread of the group may run while Python exits.

Known: a gloo thread takes the GIL to free the tensors of the last message. If the thread is late and Python is exiting,
CPython before 3.14 ends the thread by unwinding its stack. The stack holds destructors (``~AsyncWork``) that must not be
unwound, so C++ aborts the process with "terminate called without an active exception", after all its work was done. The
threads end when the last reference to their group is dropped, not in ``destroy_process_group`` itself. docs/results/exits.md
has the stack, and a program that is aborted in this way each time.

Inferred: the abort that was seen once in a real run had this cause. It left no stack, but its message and its time are the
same.
"""

from __future__ import annotations

import importlib
import weakref
from contextlib import suppress
from typing import Any

import torch.distributed as dist

_group: weakref.ref[Any] | None = None
"""Weak reference to the process group of the last run; None before the first."""


def import_group_holders() -> None:
    """Import ``torch.distributed.nn.functional`` before the group exists, so that the module keeps no reference to it.

    Its functions have the group as a default argument, which is evaluated at the import. Models import the module late.
    """
    if dist.is_available():
        importlib.import_module("torch.distributed.nn.functional")


def remember_group() -> None:
    """Store a weak reference to the group that this process has joined, for :func:`outlived`."""
    global _group
    _group = weakref.ref(dist.distributed_c10d._get_default_group())


def outlived() -> bool:
    """Return whether a reference to the group of this process still exists, so that its threads still run."""
    return _group is not None and _group() is not None


def abort() -> None:
    """Leave the group after an error by closing its connections. That ends every pending collective, in all processes.

    An orderly exit would wait for processes that may be gone. Without any exit, threads would run while Python exits.
    """
    group = dist.distributed_c10d._get_default_group()
    with suppress(RuntimeError):
        group.abort()
    # Only gloo: destroying an NCCL group waits for the device, perhaps for ever; its threads end with the process.
    if group.name() == "gloo":
        del group
        with suppress(RuntimeError):
            dist.destroy_process_group()
