"""One run at a time on one output folder: a hidden lock file beside OUT.

filelock takes a lock of the kernel, so it ends with its process, however that ends. On file systems without such locks a second
file is the lock. What the file holds tells people who holds the lock.
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
"""What ``flock`` answers on file systems without it, as some network file systems are."""

_SECONDS = 0.2
"""To try for: the holder before us may be removing its file just now."""


def lock_path(out: Path) -> Path:
    """Return the hidden file beside ``out`` that is locked while a run writes it."""
    out = out.resolve()
    return out.parent / f".{out.name}.lock"


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the lock of an output folder; missing parents are made, and removed at the end if they are still empty.

    Args:
        out: the folder that a run is going to write.

    Raises:
        UserError: another process holds the lock; names it.
        ResourceError: nothing can be written beside ``out``.
    """
    path = lock_path(out)
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = _acquire(path, out)
        except OSError as error:
            raise ResourceError(f"cannot write beside OUT {out}: {error.strerror}") from error
        try:
            if not isinstance(lock, SoftFileLock):  # which names its holder itself
                path.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}), encoding="utf-8")
            yield
        finally:
            # Before the release: afterwards it may be another run's.
            path.unlink(missing_ok=True)
            lock.release()
    finally:
        for parent in made:
            with suppress(OSError):  # it holds the output, or something that others put there
                parent.rmdir()


def _acquire(path: Path, out: Path) -> BaseFileLock:
    try:
        return _acquired(FileLock(path, fallback_to_soft=False), out)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    return _acquired(SoftFileLock(path.with_suffix(".held")), out)


def _acquired(lock: BaseFileLock, out: Path) -> BaseFileLock:
    try:
        lock.acquire(timeout=_SECONDS, poll_interval=_SECONDS / 10)
    except Timeout as error:
        raise UserError(
            f"OUT {out} is being written by {_holder(Path(lock.lock_file))}; wait for it, or choose another folder"
        ) from error
    return lock


def _holder(path: Path) -> str:
    """Name the process that holds a lock, as its file does: JSON, or filelock's own lines of process and host."""
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if text.startswith("{") else dict(zip(("pid", "host"), text.split(), strict=False))
        pid, host = values["pid"], values["host"]
    except (OSError, ValueError, KeyError):
        return "another process"  # which has not written it yet, or has just ended
    elsewhere = "" if host == socket.gethostname() else f" (if it is dead, delete {path})"
    return f"process {pid} on {host}{elsewhere}"
