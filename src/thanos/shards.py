"""Writing a checkpoint in place, tensor by tensor, and giving it its name only when it is complete.

Output shards have the layout of the input's: a tensor's bytes go to its offset once, in any order.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from thanos.checkpoint import INDEX_NAME, Checkpoint, LoadedCheckpoint, TensorInfo, read_tensor
from thanos.errors import ResourceError, UserError

_CHUNK = 8 << 20


class CheckpointWriter:
    """The shards of an output folder.

    Args:
        checkpoint: whose layout is mirrored, and from which untouched tensors are copied.
        folder: an existing folder; the shard files are created at their full size.

    Raises:
        ResourceError: the disk has too little room.
    """

    def __init__(self, checkpoint: Checkpoint, folder: Path) -> None:
        self._checkpoint, self._folder = checkpoint, folder
        self.written: set[str] = set()
        needed = sum(shard.size for shard in checkpoint.shards)
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise ResourceError(
                f"disk full: the output needs {needed / 1e9:.2f} GB and {folder.parent} has {free / 1e9:.2f} GB free; "
                "free some space, or write OUT to another disk"
            )
        for shard in checkpoint.shards:
            with (folder / shard.name).open("wb") as file:
                reserve(file.fileno(), shard.size)
                file.write(shard.header)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor's bytes to its place; shape and dtype must be those of the layout."""
        info = self._checkpoint.tensors[name]
        if tuple(tensor.shape) != info.shape or tensor.dtype != info.dtype:
            raise ValueError(
                f"{name} is {info.dtype} {info.shape} in the layout, got {tensor.dtype} {tuple(tensor.shape)}"
            )
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        with (self._folder / info.shard).open("r+b", buffering=0) as file:
            _write_at(file.fileno(), memoryview(data.numpy().data), info.offset)
        self.written.add(name)

    def read(self, name: str) -> Tensor:
        """Return a tensor that was written."""
        info = self._checkpoint.tensors[name]
        return read_tensor(self._folder / info.shard, info)

    def finish(self) -> None:
        """Copy what was never written from the checkpoint, write the index, and force everything to the disk."""
        for name, info in self._checkpoint.tensors.items():
            if name not in self.written:
                self._copy(name, info)
        if self._checkpoint.index is not None:
            (self._folder / INDEX_NAME).write_bytes(self._checkpoint.index)
        for path in self._folder.iterdir():
            sync(path)

    def _copy(self, name: str, info: TensorInfo) -> None:
        if isinstance(self._checkpoint, LoadedCheckpoint):
            self.write(name, self._checkpoint.read(name))
            return
        source, target = self._checkpoint.folder / info.shard, self._folder / info.shard
        with source.open("rb", buffering=0) as read, target.open("r+b", buffering=0) as write:
            read.seek(info.offset)
            end, offset = info.offset + info.nbytes, info.offset
            while offset < end:
                chunk = read.read(min(_CHUNK, end - offset))
                if not chunk:
                    raise ResourceError(
                        f"{source} became shorter while it was read; leave the input alone during a run"
                    )
                _write_at(write.fileno(), memoryview(chunk), offset)
                offset += len(chunk)
        self.written.add(name)


def reserve(descriptor: int, size: int) -> None:
    """Give a file its size, with room on the disk where the file system can promise it."""
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    os.ftruncate(descriptor, size)


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
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


def check_output(out: Path, *, model: Path | None, overwrite: bool) -> None:
    """Refuse an output folder that may not be written. Changes nothing.

    Args:
        out: the folder to be.
        model: the input's folder or file, which must not be touched; None where it is not a local one.
        overwrite: whether an existing checkpoint at ``out`` may be replaced.

    Raises:
        UserError: ``out`` exists and is not empty, is a file, or is, holds or lies in the model.
    """
    resolved = out.resolve()
    if model is not None:
        model = model.resolve()
        if resolved == model or model in resolved.parents:
            raise UserError(f"OUT {out} is the model's own folder, or inside it; choose a folder outside {model}")
        if resolved in model.parents:
            raise UserError(f"OUT {out} holds the model {model}, which would be lost; choose another folder")
    if resolved.exists() and not resolved.is_dir():
        raise UserError(f"OUT {out} is a file; give the name of a folder")
    if resolved.is_dir() and any(resolved.iterdir()):
        if not overwrite:
            raise UserError(f"OUT {out} exists and is not empty; choose another folder, or give --overwrite")
        if not any(resolved.glob("*.safetensors")) and not (resolved / "config.json").exists():
            raise UserError(
                f"OUT {out} is no model checkpoint, so --overwrite will not delete it; choose another folder"
            )


def make_work_folder(out: Path) -> Path:
    """Make the hidden sibling in which ``out`` grows: a new, empty folder on the same file system.

    Raises:
        ResourceError: the folder cannot be made.
    """
    resolved = out.resolve()
    work = resolved.parent / f".{resolved.name}.partial"
    try:
        work.parent.mkdir(parents=True, exist_ok=True)
        if work.exists():
            shutil.rmtree(work)
        work.mkdir()
    except OSError as error:
        raise ResourceError(f"cannot write beside OUT {out}: {error.strerror}") from error
    return work


@contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """Give a new work folder; at the end remove what is left of it, and of the parents that were made for it."""
    made = [parent for parent in out.resolve().parents if not parent.exists()]
    try:
        work = make_work_folder(out)
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)
    finally:
        for parent in made:
            with suppress(OSError):  # it holds the finished output, or something that others put there
                parent.rmdir()


def publish(work: Path, out: Path, *, overwrite: bool) -> None:
    """Give the finished work folder its name.

    A rename either happens or not, so no half-written folder ever has the name ``out``.

    Raises:
        UserError: ``out`` came into being meanwhile.
    """
    out = out.resolve()
    for path in (*work.iterdir(), work):
        sync(path)
    old = out.parent / f".{out.name}.old"
    replaces = out.is_dir() and any(out.iterdir())
    if replaces:
        if not overwrite:
            raise UserError(f"OUT {out.name} came into being during the run; move it away or give --overwrite")
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    try:
        work.rename(out)
    except BaseException:
        if replaces:
            old.rename(out)
        raise
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)
