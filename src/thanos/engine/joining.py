"""Joining and leaving a run on several processes."""

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
from thanos.system.ranks import count_failed_machines, first_to_fail, launched

_TIMEOUT = timedelta(minutes=30)
"""Longest wait for the other processes; longer than any work between two collectives, such as a forward pass."""


def my_device(device: torch.device) -> torch.device:
    """Return the device of this process. With several processes on GPUs, it is the GPU with the number of the local rank.

    Raises RecipeError if ``device`` names one GPU by number, so that all processes would share it, or the machine has too few
    GPUs.
    """
    if not launched() or device.type != "cuda":
        return device
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device.index is not None:
        raise RecipeError(f"--device {device} is one GPU, but torchrun started several processes; give --device cuda")
    if local >= torch.cuda.device_count():
        raise RecipeError(
            f"torchrun started process number {local + 1} on a machine with {torch.cuda.device_count()} GPUs; give "
            "--nproc-per-node at most their number, or --device cpu"
        )
    return torch.device("cuda", local)


@contextmanager
def join(device: torch.device) -> Iterator[World]:
    """Yield the processes of this run, this one on ``device``.

    They are the group that the caller has initialised, else the processes that torchrun started, else this process alone.
    """
    if dist.is_available() and dist.is_initialized():
        yield Group() if dist.get_world_size() > 1 else SINGLE
        return
    if not launched():
        yield SINGLE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    leaving.import_group_holders()
    count_failed_machines(_count_failed_machine)
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
        # Before the abort, which makes the other processes fail too.
        first_to_fail()
        leaving.abort()
        raise
    dist.destroy_process_group()


def _count_failed_machine() -> int:
    """Add one to the number of machines on which the run has failed, in the store of all processes; return the sum.

    Returns 1 without the store: then each machine reports the error.
    """
    try:
        return dist.distributed_c10d._get_default_store().add("thanos/failed", 1)
    except (RuntimeError, ValueError):  # there is no process group yet, or the machine that has the store is gone
        return 1
