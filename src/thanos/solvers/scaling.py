"""Conversion of weights to the dtype of the computation, scaled so that squares neither overflow nor underflow."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from thanos.errors import NumericsError
from thanos.solvers.hessian import InputStatistics

_ORDINARY = 2.0**40
"""Weights below this and above its reciprocal can be squared and summed in float32 without overflow or underflow."""


def scaled_weight(weight: Tensor, inputs: InputStatistics | None, name: str) -> tuple[Tensor, int, float]:
    """Return the weight divided by a power of two, the number of its zeros, and that power, usually 1.

    The returned weight has the dtype of the computation. Raises NumericsError if the weight holds NaN or infinity.
    """
    dtype = inputs.dtype if inputs is not None else _compute_dtype(weight)
    dense = weight.detach().to(dtype).contiguous()  # the kernels take contiguous rows
    largest, zeros = _survey(dense)
    if not math.isfinite(largest):
        raise NumericsError(f"{name} holds NaN or infinity; the checkpoint is damaged, or its dtype overflowed")
    unit = _unit(largest)
    if unit != 1:
        dense = dense / unit
        zeros = _survey(dense)[1]  # the division may have turned small entries into zeros
    return dense, zeros, unit


def _compute_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _survey(dense: Tensor) -> tuple[float, int]:
    """Return the largest absolute entry, NaN if any entry is NaN, and the number of zeros, with one synchronisation."""
    if not dense.numel():
        return 0.0, 0
    facts = *dense.aminmax(), dense.count_nonzero()
    least, most, others = torch.stack([fact.to(torch.float64) for fact in facts]).tolist()
    return max(-least, most), dense.numel() - int(others)


def _unit(largest: float) -> float:
    """Return the power of two by which a weight is divided while it is pruned: 1 unless its entries are very large or small."""
    return 1.0 if largest == 0 or 1 / _ORDINARY < largest < _ORDINARY else 2.0 ** (math.frexp(largest)[1] - 1)
