"""One run at a time on one output folder.

The lock is the kernel's (``flock``) on a hidden file beside OUT, so it ends with the process that holds it, however that
ends; what the file says is for people, and for file systems on which the kernel's lock does not work.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from thanos.errors import ResourceError, UserError

_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What ``flock`` answers where the file system has no such lock, as some network file systems do."""


def lock_path(out: Path) -> Path:
    """Return the hidden file beside ``out`` that is locked while a run writes it."""
    out = out.resolve()
    return out.parent / f".{out.name}.lock"


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the lock of an output folder; missing parents are made, and removed at the end if nothing came into them.

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
            descriptor = _acquire(path, out)
        except OSError as error:
            raise ResourceError(f"cannot write beside OUT {out}: {error.strerror}") from error
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(_holder()).encode(), 0)
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(descriptor)
    finally:
        for parent in made:
            with suppress(OSError):  # it holds the output, or something that others put there
                parent.rmdir()


def _acquire(path: Path, out: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _lock(descriptor, path, out)
            # The holder before us removes the file at its end: a lock on a removed file would guard nothing.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, path: Path, out: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(_in_use(out, _read(descriptor))) from error
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        holder = _read(descriptor)
        if holder and holder.get("host") != socket.gethostname():
            raise UserError(f"{_in_use(out, holder)}; if that run is dead, delete {path}") from error
        if holder and _runs(holder):
            raise UserError(_in_use(out, holder)) from error


def _in_use(out: Path, holder: dict[str, Any]) -> str:
    who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
    return f"OUT {out} is being written by {who}; wait for it, or choose another folder"


def _holder() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())}


def _read(descriptor: int) -> dict[str, Any]:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}  # its holder has not written it yet
    return holder if isinstance(holder, dict) and {"pid", "host"} <= holder.keys() else {}


def _runs(holder: dict[str, Any]) -> bool:
    """Tell whether the process that a lock names still runs; a later process may have been given its number."""
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it runs, as another user
    return holder.get("started") in (None, _started(holder["pid"]))


def _started(pid: int) -> int | None:
    """Return when a process began, in clock ticks since boot; None where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[19])  # field 22 of the line; the second, the command's name, may hold spaces
