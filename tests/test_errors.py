"""The translation of exhausted memory, exhausted disks and other errors of the system into user errors."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from thanos.errors import ResourceError, is_out_of_memory, resource_errors


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory on the device: lower it, or use --device cpu"),
        (MemoryError(), "out of memory on the host: lower it"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory"), "out of memory on the host: lower it"),
        (RuntimeError("mmap: Cannot allocate memory (12)"), "out of memory on the host: lower it"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "disk full; free some space, or write to another disk"),
        (OSError(errno.EDQUOT, "Quota", "/a/b"), "/a/b: disk full; free some space, or write to another disk"),
        (OSError(errno.EROFS, "Read-only file system", "/a"), "/a: Read-only file system; write to another disk"),
    ],
)
def test_an_exhausted_resource_is_one_line_that_says_what_to_do(error: Exception, line: str) -> None:
    with pytest.raises(ResourceError) as caught, resource_errors("lower it"):
        raise error
    assert str(caught.value) == line
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), OSError(errno.EIO, "Input/output error"), KeyError(1)]
)
def test_other_errors_pass(error: Exception) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as caught, resource_errors("lower it"):
        raise error
    assert caught.value is error


def test_the_cpu_is_a_remedy_for_the_memory_of_another_device_only() -> None:
    lines = []
    for device, error in (
        ("cuda:1", torch.OutOfMemoryError()),
        ("cpu", torch.OutOfMemoryError()),
        ("cuda:1", MemoryError()),
    ):
        with pytest.raises(ResourceError) as caught, resource_errors(device=device):
            raise error
        lines.append(str(caught.value))
    assert lines == [
        "out of memory on cuda:1: use --device cpu",
        "out of memory on cpu: close other programs that use it",
        "out of memory on the host: close other programs that use it",
    ]
