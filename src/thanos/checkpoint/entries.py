"""Look at the entries of tensors: count zeros, refuse NaN and infinity."""

from __future__ import annotations

import torch
from torch import Tensor

from thanos.errors import NumericsError


def count_zeros(name: str, part: Tensor) -> int:
    """Return the zeros of a part of a tensor.

    Raises:
        NumericsError: it holds NaN or infinity.
    """
    wide = part.dtype.itemsize > 1
    # Matrices of flags would fragment the heap, more with every block. The sum of finite entries may overflow, but NaN or
    # infinity never makes it finite.
    finite = not part.is_floating_point() or (wide and bool(torch.isfinite(part.sum())))
    if not finite and not bool(torch.isfinite(part).all()):
        raise NumericsError(f"{name} holds NaN or infinity; the checkpoint is damaged: download or save it again")
    return count_any_zeros(name, part)


def count_any_zeros(name: str, part: Tensor) -> int:
    """Return the zeros of a part of a tensor that may hold anything, NaN and infinity too."""
    del name
    if part.dtype.itemsize == 1 or part.dtype in (
        torch.uint16,
        torch.uint32,
        torch.uint64,
    ):  # torch does not count these
        return int((part == 0).sum())
    return part.numel() - int(torch.count_nonzero(part))
