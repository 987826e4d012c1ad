"""How a process leaves the group of a run: no thread of the group may run while Python ends.

Known: a gloo thread takes Python's lock to drop the tensors of the last message. If it is late and Python is about to end,
CPython before 3.14 ends the thread by unwinding its stack. The stack holds destructors (``~AsyncWork``), which must not be
unwound: C++ aborts the process, "terminate called without an active exception", after all its work was done. The threads end
with the last reference to their group, not with ``destroy_process_group`` itself. docs/results/exits.md has the stack, and a
program that is aborted so each time.

Inferred: that the abort seen once in a real run was this one. It left no stack; its message and its moment are the same.
"""

from __future__ import annotations

import importlib
import weakref
from contextlib import suppress
from typing import Any

import torch.distributed as dist

_group: weakref.ref[Any] | None = None
"""The group of the last run."""


def load_what_keeps_the_group() -> None:
    """Import, before there is a group, the module that would keep it.

    The functions of ``torch.distributed.nn.functional`` have the group of the moment of its import as a default argument.
    Models import it late.
    """
    if dist.is_available():
        importlib.import_module("torch.distributed.nn.functional")


def remember_group() -> None:
    """Note the group that this process has joined, for :func:`outlived`."""
    global _group
    _group = weakref.ref(dist.distributed_c10d._get_default_group())


def outlived() -> bool:
    """Whether somebody still holds the group that this process has joined, so that its threads run."""
    return _group is not None and _group() is not None


def abort() -> None:
    """Leave the group after an error: close the connections, which ends what waits for other processes, here and there.

    Leaving in order would mean waiting for processes that may be gone; not leaving would mean threads that run while Python
    ends.
    """
    group = dist.distributed_c10d._get_default_group()
    with suppress(RuntimeError):
        group.abort()
    if group.name() == "gloo":  # leaving NCCL waits for the device, perhaps for ever; its threads end with the process
        del group
        with suppress(RuntimeError):
            dist.destroy_process_group()
