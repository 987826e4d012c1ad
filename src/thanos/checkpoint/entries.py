"""Check the entries of tensors: count zeros, count or refuse NaN and infinity."""

from __future__ import annotations

import torch
from torch import Tensor

from thanos.errors import NumericsError


def count_zeros(name: str, part: Tensor) -> int:
    """Return the number of zeros in a part of a tensor.

    Args:
        name: name of the tensor, for messages.
        part: any shape and dtype.

    Raises:
        NumericsError: the part holds NaN or infinity.
    """
    if not _sum_is_finite(part) and not bool(torch.isfinite(part).all()):
        raise NumericsError(f"{name} holds NaN or infinity; the checkpoint is damaged: download or save it again")
    return count_any_zeros(name, part)


def count_not_finite(part: Tensor) -> tuple[int, int]:
    """Return the numbers of NaN and of infinite entries, +∞ and −∞, in a part of a tensor of any shape and dtype."""
    if _sum_is_finite(part):
        return 0, 0
    wide = part.float()  # torch has no such tests for all types of 8 bits
    return int(wide.isnan().sum()), int(wide.isinf().sum())


def _sum_is_finite(part: Tensor) -> bool:
    """Whether the sum of a part proves that all its entries are finite.

    The sum needs no matrix of flags, which would fragment the heap more with every block. NaN or infinity never gives a finite
    sum. Finite entries may overflow, so a sum that is not finite proves nothing. Types of 8 bits are not summed.
    """
    return not part.is_floating_point() or (part.dtype.itemsize > 1 and bool(torch.isfinite(part.sum())))


def count_any_zeros(name: str, part: Tensor) -> int:
    """Return the number of zeros in a part of a tensor. NaN and infinity are allowed, so ``name`` is not needed."""
    del name
    if part.dtype.itemsize == 1 or part.dtype in (
        torch.uint16,
        torch.uint32,
        torch.uint64,
    ):  # torch does not count these
        return int((part == 0).sum())
    return part.numel() - int(torch.count_nonzero(part))
