"""A study whose workers start child processes. study/test_ending.py runs it as a program and ends it."""

from __future__ import annotations

import subprocess
import sys

from thanos.cli import guard
from thanos.study.events import StudyEvent
from thanos.study.run import run_study


def start_child() -> None:
    """Start a process that outlives its parent unless it is killed, as a worker's libraries may do."""
    subprocess.Popen(["sleep", "600"])


def tell(event: StudyEvent) -> None:
    """Print a line for each cell that ended."""
    if event.record is not None:
        sys.stdout.write(f"{event.done}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    path, out, data = sys.argv[1:]
    more = {"data": data, "devices": ["cpu"], "workers": 2, "on_event": tell, "initialise": start_child}
    sys.exit(guard(lambda: run_study(path, out, **more) and 0))  # type: ignore[arg-type]
