"""The command as one of several processes that torchrun started: one line for all of them, and no process that hangs."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress

_ENDED = "torchrun ended the run, because another of its processes failed or because it was told to"
_ORPHANED = "the torchrun that started this process was killed"
_KEPT = "what is finished is kept: the same command with --resume goes on, also with another number of processes"

_FOLLOW_SECONDS = 1.0
"""How often a process looks whether its torchrun is still there: a killed one sends no signal."""


def launched() -> bool:
    """Whether torchrun started this process as one of several; asked before anything heavy is imported."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def program() -> list[str]:
    """Return the words that start the command the way it was started."""
    if not launched():
        return ["thanos"]
    size, local = os.environ["WORLD_SIZE"], os.environ.get("LOCAL_WORLD_SIZE", "")
    nodes = [] if local in ("", size) else ["--nnodes", str(int(size) // int(local))]
    return ["torchrun", *nodes, "--nproc-per-node", local or size, "-m", "thanos"]


def is_first() -> bool:
    """Whether this process is the one that shows progress and results."""
    return not launched() or os.environ["RANK"] == "0"


def may_complain() -> bool:
    """Whether a failure of this process is the one to tell: the first in the run, since others only follow from it."""
    if not launched():
        return True
    distributed = sys.modules.get("thanos.engine.distributed")
    return is_first() if distributed is None else distributed.first_to_fail()


def watch() -> None:
    """End at once when torchrun says so (SIGTERM) or is gone itself, even while waiting for a process that is gone."""
    if not launched() or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "sigwait"):
        return
    # Blocked here, and so in the threads to come, the signal waits for the thread that asks for it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = os.getppid()

    def wait() -> None:
        signal.sigwait({signal.SIGTERM})
        _end(_ENDED)

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(_FOLLOW_SECONDS)
        _end(_ORPHANED)

    threading.Thread(target=wait, daemon=True, name="thanos-ended").start()
    threading.Thread(target=follow, daemon=True, name="thanos-orphaned").start()


def _end(why: str) -> None:
    with suppress(Exception):
        if may_complain():
            print(f"error: {why}; {_KEPT}", file=sys.stderr, flush=True)
    os._exit(128 + signal.SIGTERM)


def leave(code: int) -> None:
    """End a process at once, all being said and written, where the usual way out of Python is not safe.

    A failed one would wait for the others, as its libraries do. In one whose group is still held, the group's threads run on,
    and may abort the process while Python ends.
    """
    leaving = sys.modules.get("thanos.engine.leaving")
    if launched() and (code or (leaving is not None and leaving.outlived())):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
