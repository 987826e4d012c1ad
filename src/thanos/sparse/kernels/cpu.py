"""Products of packed matrices on x86-64 processors with AVX-512, by the optional extension ``_cpu``, written in C."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from thanos.sparse.kernels.extensions import load
from thanos.sparse.tiles import SIDE

MOST_TOKENS = 32
"""Largest number of tokens for which the packed matrix is multiplied directly. For more, it is decoded in parts, which the
library multiplies. With 32 tokens on one core the kernel takes half to four fifths of that time, and with 48 about as long."""

_DOT_BFLOAT16, _BFLOAT16, _FLOAT16 = 0, 1, 2
"""Kinds of arithmetic in ``_cpu.c`` and ``_dense.c``."""

_BYTES_PER_THREAD = 1 << 16
"""Least number of bytes of the matrix for each thread, since starting a thread takes about a microsecond."""


def arithmetic_of(dtype: torch.dtype, support: int, *, dot: bool) -> int:
    """Return the kind of arithmetic for values of a dtype; ``support`` is the result of the extension's ``support()``."""
    if dtype == torch.float16:
        return _FLOAT16
    return _DOT_BFLOAT16 if dot and support > 1 else _BFLOAT16


def threads_for(parts: int, nbytes: int) -> int:
    """Return the number of threads for a matrix of this size that consists of ``parts`` independent parts."""
    return max(1, min(torch.get_num_threads(), parts, nbytes // _BYTES_PER_THREAD))


@cache
def lacking() -> str:
    """Return the reason why this machine cannot run the kernels; empty if it can."""
    extension, reason = load("_cpu")
    if extension is None:
        return reason
    return "" if extension.support() else "the processor has no AVX-512 with VBMI2"


def linear(
    x: Tensor, words: Tensor, offsets: Tensor | None, bias: Tensor | None, rows: int, n: int, *, dot: bool = True
) -> Tensor:
    """Return x Wᵀ + bias for a packed W whose content was checked.

    Args:
        x: (tokens, columns), contiguous, bfloat16 or float16, the dtype of the packed values.
        words: the tiles, int32, contiguous.
        offsets: for ``bitmap``, int32, contiguous; None for ``fixed``.
        bias: (rows,) in the dtype of x, contiguous, or None.
        rows: number of rows of W.
        n: number of values per row of each tile; 0 for ``bitmap``.
        dot: use the bfloat16 dot product of the processor if it has one. It treats subnormal numbers as zero.

    Returns:
        (tokens, rows).
    """
    tokens, columns = x.shape
    y = x.new_empty(tokens, rows)
    extension, _ = load("_cpu")
    kind = arithmetic_of(x.dtype, extension.support(), dot=dot)
    if tokens and rows:
        addresses = (0 if tensor is None else tensor.data_ptr() for tensor in (offsets, x, bias, y))
        threads = threads_for(-(-rows // SIDE), 4 * words.numel())
        extension.linear(words.data_ptr(), *addresses, rows, columns, tokens, n, kind, threads)
    return y
