"""The command as one of several processes of torchrun: one error line for all of them, and no process that hangs."""

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
"""Seconds between two checks that torchrun still runs: a killed torchrun sends no signal to its processes."""


def launched() -> bool:
    """Whether torchrun started this process as one of several. Needs no heavy import."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def program() -> list[str]:
    """Return the words that start the command again in the same way: with torchrun or without."""
    if not launched():
        return ["thanos"]
    size, local = os.environ["WORLD_SIZE"], os.environ.get("LOCAL_WORLD_SIZE", "")
    nodes = [] if local in ("", size) else ["--nnodes", str(int(size) // int(local))]
    return ["torchrun", *nodes, "--nproc-per-node", local or size, "-m", "thanos"]


def is_first() -> bool:
    """Whether this process shows progress and results: rank 0, or the only process."""
    return not launched() or os.environ["RANK"] == "0"


def may_complain() -> bool:
    """Whether this process reports its failure: only the first failure of a run is reported, since it causes the others."""
    if not launched():
        return True
    joining = sys.modules.get("thanos.engine.joining")
    return is_first() if joining is None else joining.first_to_fail()


def watch() -> None:
    """Start threads that end this process on SIGTERM from torchrun, or when torchrun itself has died.

    This works even while the main thread waits in a collective for a dead process.
    """
    if not launched() or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "sigwait"):
        return
    # New threads inherit the blocked signal, so that only sigwait below receives it.
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
    """End the process at once if Python's usual exit is not safe; all output must be written.

    In a failed process the libraries' exit handlers would wait for the other processes. If a reference to the process group
    remains, the group's threads keep running, and may abort the process while Python exits.
    """
    leaving = sys.modules.get("thanos.engine.leaving")
    if launched() and (code or (leaving is not None and leaving.outlived())):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
