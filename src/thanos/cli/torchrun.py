"""The command as one of several processes of torchrun: one error line for all of them, and no process that hangs."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress

from thanos.system.ranks import first_to_fail, has_failed, launched

_ENDED = "torchrun ended the run: another process failed, or torchrun received a signal"
_ORPHANED = "the torchrun that started this process was killed"
_KEPT = "finished work is kept: run the same command with --resume; the number of processes may change"

_FOLLOW_SECONDS = 1.0
"""Seconds between two checks that torchrun still runs: a killed torchrun sends no signal to its processes."""

_REPORT_SECONDS = 20.0
"""Longest wait for an error line of the main thread; torchrun kills a process 30 seconds after its signal."""


def program() -> list[str]:
    """Return the words that start the command again, with torchrun if it started this process."""
    if not launched():
        return ["thanos"]
    size, local = os.environ["WORLD_SIZE"], os.environ.get("LOCAL_WORLD_SIZE", "")
    nodes = [] if local in ("", size) else ["--nnodes", str(int(size) // int(local))]
    return ["torchrun", *nodes, "--nproc-per-node", local or size, "-m", "thanos"]


_printing = threading.Lock()
_reported = threading.Event()


def _printable(line: str) -> str:
    """Return a line in which control characters, which may come from a hostile file, are escaped as in a Python string."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in line)


def report_failure(message: str) -> None:
    """Print the error line of this process, or nothing if another process of the run has failed before.

    Only one call prints, among all processes and their threads.
    """
    if not first_to_fail():
        return
    with _printing:
        if launched() and _reported.is_set():
            return
        print(f"error: {_printable(' '.join(message.split()))}", file=sys.stderr, flush=True)
        _reported.set()


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
    """End the process, with ``why`` as its error unless the main thread has one of its own."""
    with suppress(Exception):
        if has_failed() and first_to_fail():
            _reported.wait(_REPORT_SECONDS)  # the main thread is about to report its error: the cause of the signal
        report_failure(f"{why}; {_KEPT}")
    os._exit(128 + signal.SIGTERM)


def leave(code: int) -> None:
    """End the process without Python's usual exit if that is not safe. All files must have been written before.

    In a failed process the libraries' exit handlers would wait for the other processes. If a reference to the process group
    remains, the group's threads keep running, and may abort the process while Python exits.
    """
    leaving = sys.modules.get("thanos.engine.leaving")
    if launched() and (code or (leaving is not None and leaving.outlived())):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
