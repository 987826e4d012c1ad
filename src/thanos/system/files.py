"""Files on disk: free space, reserved space, and writes that are forced to the disk or atomic."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

_CHUNK = 1 << 16
"""Bytes that :func:`trim` reads at once."""


def trim(descriptor: int) -> int:
    """Truncate an open text file after its last complete line; return the new size in bytes."""
    # Read backwards, chunk by chunk, up to the last newline.
    size = start = os.fstat(descriptor).st_size
    end = 0
    while start and not end:
        last, start = start, max(0, start - _CHUNK)
        end = start + 1 + os.pread(descriptor, last - start, start).rfind(b"\n")
        end = end if end > start else 0
    if end < size:
        os.ftruncate(descriptor, end)
    return end


def free_disk_bytes(folder: Path) -> int:
    """Return the bytes free for this user on the disk of ``folder``, or of the nearest parent that exists."""
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def reserve(descriptor: int, size: int) -> None:
    """Set the size of a file in bytes, and reserve the disk space if the file system can. The content is kept."""
    os.ftruncate(descriptor, size)
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # the file system cannot reserve space
                raise


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` at an offset of an open file."""
    while data.nbytes:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def sync(path: Path) -> None:
    """Force a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes | Callable[[Path], object], *, durable: bool = False) -> None:
    """Write a temporary file, then rename it. A reader never sees a partial file; one of several writers wins.

    Args:
        path: path of the file.
        content: the bytes, or a function that writes them to a given path.
        durable: force the file and its folder to the disk.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        if callable(content):
            content(part)
        else:
            part.write_bytes(content)
        if durable:
            sync(part)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)
