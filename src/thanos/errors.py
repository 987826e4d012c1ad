"""The exceptions that callers may see.

A message names the refused value, what is allowed, and what to change. The command line maps
:class:`UserError` to exit code 2 and everything else to exit code 1.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class ThanosError(Exception):
    """Base of every exception that this package raises on purpose."""


class UserError(ThanosError, ValueError):
    """The request cannot be carried out as given; the message says what to change."""


class RecipeError(UserError):
    """A recipe (method, pattern, sparsity, ...) is malformed or contradicts itself."""


class StudyError(UserError):
    """A study is malformed; the message names the file, the line and the field."""


class ModelError(UserError):
    """A model, tokenizer or checkpoint file is missing, broken or not supported."""


class DataError(UserError):
    """Calibration or evaluation text is missing, too short or unreadable."""


class NumericsError(UserError):
    """Weights, activations or statistics hold NaN or infinity; the message names the layer."""


class ResourceError(UserError):
    """The device is absent, memory or disk is exhausted, or a file may not be accessed; the message says what to change."""


class CudaUnavailableError(ResourceError):
    """A CUDA device is required, and torch reports none."""


def recurs(error: BaseException) -> bool:
    """Return whether the same request would certainly fail again: the request, the model or this program is at fault.

    Interrupts and temporary faults (exhausted memory or disk, a failing device) do not recur.
    """
    if isinstance(error, UserError):
        return not isinstance(error, ResourceError)
    faults = (TypeError, ValueError, LookupError, AttributeError, AssertionError, NotImplementedError)
    return isinstance(error, faults)


_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)

_REMEDIES = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "free some space, or write to another disk",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or write to another disk",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EACCES: "choose a folder where you may read and write",
    errno.EPERM: "choose a folder where you may read and write",
    errno.EROFS: "write to another disk",
}


def remedy_for(error: OSError) -> str:
    """Return what a user can change about an error of the operating system; empty if nothing is known."""
    return _REMEDIES.get(error.errno or 0, "")


_HOST_IS_FULL = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
"""Parts of torch's messages for exhausted host memory. Torch has no separate exception for it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the memory of the device or of the host is exhausted."""
    if isinstance(error, MemoryError) or _is_of_device(error):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _HOST_IS_FULL)


def _is_of_device(error: BaseException) -> bool:
    # Compare the names of the classes: this module does not import torch.
    return any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)


@contextmanager
def resource_errors(*remedies: str, device: object = "the device") -> Iterator[None]:
    """Convert errors that a user can fix, of memory and of the operating system, to one line with a remedy.

    Other errors are raised unchanged.

    Args:
        remedies: changes that lower memory use. If the memory of a device is exhausted, ``--device cpu`` is added.
        device: name of the device.

    Raises:
        ResourceError: memory or a disk is exhausted, a disk is read-only, a file may not be read or written, or a name is too
            long.
    """
    try:
        yield
    except OSError as error:
        remedy = remedy_for(error)
        if not remedy:
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        what = "disk full" if error.errno in _DISK_IS_FULL else error.strerror
        raise ResourceError(f"{where}{what}; {remedy}") from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        on_device = _is_of_device(error)
        cpu = ["use --device cpu"] if on_device and str(device) != "cpu" else []
        choices = [*remedies, *cpu] or ["close other programs that use it"]
        raise ResourceError(
            f"out of memory on {device if on_device else 'the host'}: {', or '.join(choices)}"
        ) from error
