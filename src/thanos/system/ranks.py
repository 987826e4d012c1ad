"""The processes that torchrun starts, as their environment describes them. Needs no import of torch."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path


def launched() -> bool:
    """Return whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def is_main_process() -> bool:
    """Return whether this process is the only one, or rank 0 of a torchrun: the one that shows progress and results."""
    return not launched() or os.environ["RANK"] == "0"


# --- the first failure -----------------------------------------------------------------------------------------------------

_deciding = threading.Lock()
_first: bool | None = None
"""Whether this process was the first of the run to fail; None until it has failed."""

_count_machine: Callable[[], int] | None = None
"""Adds one to the number of machines on which the run has failed, and returns the sum; None if they cannot be counted."""


def count_failed_machines(count: Callable[[], int]) -> None:
    """Set the function that counts the machines on which the run has failed, for a run on several of them.

    It adds one to a number that all machines share, and returns the sum.
    """
    global _count_machine
    _count_machine = count


def has_failed() -> bool:
    """Return whether this process has called :func:`first_to_fail`. A call in progress counts."""
    with _deciding:
        return _first is not None


def first_to_fail() -> bool:
    """Return whether this process is the first of the run to fail. Only that process should report its error.

    The first failure causes the others, and rank 0 may be ended by torchrun before it fails by itself. So the order of the
    failures decides, not the rank. Repeated calls, also from other threads, return the same answer.
    """
    global _first
    if not launched():
        return True
    with _deciding:
        if _first is None:
            _first = _is_first_here() and _is_first_machine()
        return _first


def _is_first_here() -> bool:
    """Create a file in the folder of torchrun's error files; return whether no other process has created it before.

    Without such a folder, as with another launcher, rank 0 counts as the first.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE", "")  # FOLDER/attempt_N/LOCAL_RANK/error.json
    if error_file:
        try:
            (Path(error_file).parents[1] / "thanos-failed").touch(exist_ok=False)
        except FileExistsError:
            return False
        except (OSError, IndexError):
            pass
        else:
            return True
    return os.environ["RANK"] == "0"


def _is_first_machine() -> bool:
    several = os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]) != os.environ["WORLD_SIZE"]
    return not several or _count_machine is None or _count_machine() == 1
