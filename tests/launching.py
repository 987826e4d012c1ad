"""Several processes on this machine: the command under torchrun, or a function in a process group."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from thanos.engine import leaving


def torchrun(
    processes: int, program: list[str], arguments: list[Any], **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run ``program``, a script or ``-m`` and a module, on several processes; return the outcome with its output."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*words, *program, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=900,  # however busy the machine
        check=False,
    )


def error_lines(run: subprocess.CompletedProcess[str]) -> list[str]:
    """Return the lines with which the command, not torchrun, reports an error."""
    return [line for line in (run.stdout + run.stderr).splitlines() if line.startswith("error:")]


def spawn(work: Any, size: int, folder: Path, *arguments: Any) -> list[Any]:
    """Run ``work(*arguments)`` in ``size`` processes joined by gloo; return what each returned."""
    mp.spawn(_enter, (work, size, folder, arguments), nprocs=size)
    return [torch.load(folder / f"result{rank}", weights_only=False) for rank in range(size)]


def _enter(rank: int, work: Any, size: int, folder: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    leaving.import_group_holders()  # else their reference keeps its threads alive while Python ends
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    torch.save(work(*arguments), folder / f"result{rank}")
    dist.destroy_process_group()
