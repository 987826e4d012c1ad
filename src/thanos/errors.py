"""The exceptions that callers may see.

A message says what came, what is allowed, and what to change. The command line maps
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
    """The device is absent, or memory or disk is exhausted; the message says which setting to lower."""


class CudaUnavailableError(ResourceError):
    """A CUDA device was asked for and torch sees none."""


def recurs(error: BaseException) -> bool:
    """Tell whether the same request is sure to meet an error again: the request, the model or this program is at fault.

    What interrupts a run, or what it lacks for a while (memory, disk, a device that fails), is not.
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
    errno.EACCES: "give a place that you may read and write",
    errno.EPERM: "give a place that you may read and write",
    errno.EROFS: "write to another disk",
}


_HOST_IS_FULL = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
"""How torch says that the host's memory is exhausted: it has no exception of its own for that."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that the device's or the host's memory is exhausted."""
    if isinstance(error, MemoryError) or _is_of_device(error):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _HOST_IS_FULL)


def _is_of_device(error: BaseException) -> bool:
    # By name, so that these exceptions do not cost an import of torch.
    return any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)


@contextmanager
def resource_errors(*remedies: str, device: object = "the device") -> Iterator[None]:
    """Turn exhausted memory, and errors of the operating system that a person can mend, into lines that say how; others pass.

    Args:
        remedies: what takes less memory. For the memory of a device, the CPU is one more.
        device: its name.

    Raises:
        ResourceError: memory or a disk is exhausted, a disk is read-only, a file may not be read or written, or a name is too
            long.
    """
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0)
        if remedy is None:
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        what = "disk full" if error.errno in _DISK_IS_FULL else error.strerror
        raise ResourceError(f"{where}{what}; {remedy}") from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        on_device = _is_of_device(error)
        cpu = ["use --device cpu"] if on_device and str(device) != "cpu" else []
        choices = [*remedies, *cpu] or ["end what else uses it"]
        raise ResourceError(
            f"out of memory on {device if on_device else 'the host'}: {', or '.join(choices)}"
        ) from error
