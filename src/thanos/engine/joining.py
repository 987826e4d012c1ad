"""How a process joins and leaves a run on several processes, and which of them reports the run's error."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from thanos.engine import leaving
from thanos.engine.distributed import SINGLE, Group, World, lost_peers
from thanos.errors import RecipeError

_TIMEOUT = timedelta(minutes=30)
"""Longest wait for the other processes; longer than any of them works between two collectives, as in a forward pass."""


def launched() -> bool:
    """Return whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def speaks() -> bool:
    """Return whether this process is the only one, or rank 0 of those that torchrun started.

    It reads only the environment, so it can be called before the process group exists.
    """
    return not launched() or os.environ["RANK"] == "0"


def my_device(device: torch.device) -> torch.device:
    """Return the device of this process. With several processes on GPUs, it is the GPU with the number of the local rank.

    Raises:
        RecipeError: ``device`` names one GPU by number, so that all processes would share it, or the machine has too few GPUs.
    """
    if not launched() or device.type != "cuda":
        return device
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device.index is not None:
        raise RecipeError(f"--device {device} is one GPU, but torchrun started several processes; give --device cuda")
    if local >= torch.cuda.device_count():
        raise RecipeError(
            f"torchrun started a process number {local + 1} on a machine with {torch.cuda.device_count()} GPUs; give "
            "--nproc-per-node at most their number, or --device cpu"
        )
    return torch.device("cuda", local)


@contextmanager
def join(device: torch.device) -> Iterator[World]:
    """Yield the processes of this run.

    These are the processes of a group that the caller has initialised, else those that torchrun started, else this one alone.

    Args:
        device: device of this process; see :func:`my_device`.
    """
    if dist.is_available() and dist.is_initialized():
        yield Group() if dist.get_world_size() > 1 else SINGLE
        return
    if not launched():
        yield SINGLE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    leaving.load_what_keeps_the_group()
    global _first
    _first = None
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        timeout=_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    leaving.remember_group()
    try:
        yield Group()
        with lost_peers():
            dist.barrier()  # no process leaves while another still works
    except BaseException:
        # Before the abort: it makes the other processes fail too, and closes the store that first_to_fail() reads.
        first_to_fail()
        leaving.abort()
        raise
    dist.destroy_process_group()


_first: bool | None = None
"""Whether this process was the first to fail; None until :func:`first_to_fail` has read it from the store."""


def first_to_fail() -> bool:
    """Return whether this process is the first of the run to fail. Only that process should report its error.

    Repeated calls return the same answer.
    """
    global _first
    if not launched():
        return True
    if _first is None:
        try:
            _first = dist.distributed_c10d._get_default_store().add("thanos/failed", 1) == 1
        except (RuntimeError, ValueError):
            # There was no process group, or its store is gone. All processes have the same error, so rank 0 reports it.
            return os.environ["RANK"] == "0"
    return _first
