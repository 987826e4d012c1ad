"""The command under torchrun, on processes of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any


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
