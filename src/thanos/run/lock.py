"""The lock of an output folder, so that only one run at a time writes it: a hidden file next to OUT.

filelock takes a kernel lock, which is released when its process ends, in whatever way. On file systems without kernel locks,
the existence of a second file is the lock. The content of the file names the process that holds the lock.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from thanos.errors import ResourceError, UserError

_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
"""Errors of ``flock`` on file systems that do not support it, such as some network file systems."""

_SECONDS = 0.2
"""Seconds for which the lock is tried again, since the previous holder may be removing its file at this moment."""


def lock_path(out: Path) -> Path:
    """Return the hidden file next to ``out`` that is locked while a run writes ``out``."""
    out = out.resolve()
    return out.parent / f".{out.name}.lock"


@contextmanager
def locked(out: Path, name: str = "OUT") -> Iterator[None]:
    """Hold the lock of an output folder. Missing parent folders are created, and removed at the end if they are still empty.

    ``name`` is what the command calls the folder. Raises UserError, which names the process, if another one holds the lock, and
    ResourceError if the folder cannot be written.
    """
    path = lock_path(out)
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # filelock waits for a file that it cannot create, as if another process held the lock.
            path.open("ab").close()
            lock = _acquire(path, out, name)
        except OSError as error:
            raise ResourceError(
                f"cannot write next to {name} {out}: no lock file can be created in {path.parent} ({error.strerror}); choose "
                "another folder"
            ) from error
        try:
            if not isinstance(lock, SoftFileLock):  # filelock writes process and host into a soft lock file itself
                path.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}), encoding="utf-8")
            yield
        finally:
            # Before the release: after it, the file may belong to another run.
            path.unlink(missing_ok=True)
            lock.release()
    finally:
        for parent in made:
            with suppress(OSError):  # not empty: it holds the output, or files of others
                parent.rmdir()


def _acquire(path: Path, out: Path, name: str) -> BaseFileLock:
    try:
        return _acquired(FileLock(path, fallback_to_soft=False), out, name)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    return _acquired(SoftFileLock(path.with_suffix(".held")), out, name)


def _acquired(lock: BaseFileLock, out: Path, name: str) -> BaseFileLock:
    try:
        lock.acquire(timeout=_SECONDS, poll_interval=_SECONDS / 10)
    except Timeout as error:
        raise UserError(
            f"{name} {out} is being written by {_holder(Path(lock.lock_file))}; wait for it, or choose another folder"
        ) from error
    return lock


def _holder(path: Path) -> str:
    """Return a description of the process that holds a lock, from its file: JSON, or filelock's lines of process and host."""
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if text.startswith("{") else dict(zip(("pid", "host"), text.split(), strict=False))
        pid, host = values["pid"], values["host"]
    except (OSError, ValueError, KeyError):
        return "another process"  # it has not written the file yet, or it has just ended
    elsewhere = "" if host == socket.gethostname() else f" (if it is dead, delete {path})"
    return f"process {pid} on {host}{elsewhere}"
