"""Products of dense 16-bit matrices with a few tokens on x86-64 processors, by the optional extension ``_dense`` in C."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from thanos.sparse.kernels.cpu import arithmetic_of, threads_for
from thanos.sparse.kernels.extensions import load

MOST_TOKENS = 4
"""Largest number of tokens for which the kernel is used. With more, arithmetic dominates, and the library is as fast."""


@cache
def _extension() -> Any:
    """Return the extension; None if it cannot be used, or if the processor cannot run it."""
    extension, _ = load("_dense")
    return extension if extension is not None and extension.support() else None


def serves(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether the kernel can multiply these on this machine. It is False too if shapes or dtypes do not match."""
    rows, columns = weight.shape
    fits = (
        x.dim() > 0 and x.shape[-1] == columns and (bias is None or (bias.shape == (rows,) and bias.dtype == x.dtype))
    )
    sound = x.dtype == weight.dtype and weight.dtype in (torch.bfloat16, torch.float16) and weight.is_contiguous()
    return fits and sound and 0 < x.numel() <= MOST_TOKENS * columns and _extension() is not None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, dot: bool = True) -> Tensor:
    """Return x Wᵀ + bias; :func:`serves` must hold.

    Args:
        x: (..., columns), bfloat16 or float16.
        weight: W, (rows, columns), contiguous, in the dtype of x.
        bias: (rows,) in the dtype of x, or None.
        dot: use the bfloat16 dot product of the processor if it has one. It treats subnormal numbers as zero.

    Returns:
        (..., rows). Sums are float32. A token's result does not depend on the others.
    """
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    tokens, (rows, columns) = len(flat), weight.shape
    y, extension = x.new_empty(tokens, rows), _extension()
    bias = None if bias is None else bias.contiguous()
    kind, threads = arithmetic_of(x.dtype, extension.support(), dot=dot), threads_for(rows, 2 * weight.numel())
    addresses = (0 if tensor is None else tensor.data_ptr() for tensor in (weight, flat, bias, y))
    extension.linear(*addresses, rows, columns, tokens, kind, threads)
    return y.view(*x.shape[:-1], rows)
