"""Products of packed matrices on CUDA devices: kernels in CUDA C, compiled by the NVRTC that torch carries."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from thanos.sparse.tiles import SIDE

MOST_TOKENS = 8
"""Tokens up to which the matrix is read packed; above, it is expanded and the library multiplies."""

_AT_ONCE = 4
"""Most tokens of one pass over the matrix."""

_LEAST_CAPABILITY = (8, 0)
"""The kernels use instructions of this compute capability."""

_FULL_GRID = 96
"""Strips from which the columns are not split: they occupy a large device by themselves."""

_MOST_WARPS = 16


@cache
def lacking(device: torch.device) -> str:
    """Return why a device cannot run the kernels; empty if it can. The answer comes from compiling one."""
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, and the kernels need 8.0"
    if not hasattr(torch.cuda, "_compile_kernel"):
        return f"torch {torch.__version__} cannot compile kernels at run time"
    try:
        _kernel("multiply", device, 16, 1, half=False)
    except (RuntimeError, OSError) as error:
        return f"the kernels cannot be compiled ({str(error).strip().splitlines()[0]})"
    return ""


@cache
def _kernel(name: str, device: torch.device, n: int, tokens: int, *, half: bool) -> Any:
    """Compile a kernel of ``packed.cu`` for a device, once in a process."""
    in_flight = 1 if n == 0 or n > 16 else 2
    macros = {"N": n, "B": tokens, "U": in_flight, "HALF": int(half)}
    source = (Path(__file__).parent / "packed.cu").read_text(encoding="utf-8")
    lines = [f"#define {key} {value}" for key, value in macros.items()]
    with torch.cuda.device(device):
        compiled: Any = torch.cuda._compile_kernel  # private, but in all releases that are supported
        return compiled("\n".join([*lines, source]), name)


def linear(x: Tensor, words: Tensor, offsets: Tensor | None, bias: Tensor | None, rows: int, n: int) -> Tensor:
    """Return x Wᵀ + bias for a packed W.

    Args:
        x: (tokens, columns), contiguous, bfloat16 or float16, the dtype of the packed values.
        words: the tiles, int32, on the device of x.
        offsets: for ``bitmap``, int32; None for ``fixed``.
        bias: (rows,) in the dtype of x, or None.
        rows: of W.
        n: values a row of each tile; 0 for ``bitmap``.

    Returns:
        (tokens, rows).
    """
    if len(x) > MOST_TOKENS:
        return F.linear(x, expand(words, offsets, rows, x.shape[1], n, x.dtype), bias)
    return _multiply(x, words, offsets, bias, rows, n)


def _multiply(x: Tensor, words: Tensor, offsets: Tensor | None, bias: Tensor | None, rows: int, n: int) -> Tensor:
    tokens, columns = x.shape
    strips, tiles = -(-rows // SIDE), -(-columns // SIDE)
    y = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    if not tokens:
        return y
    at_once = 1 if tokens == 1 else 2 if tokens == 2 else _AT_ONCE
    groups = -(-tokens // at_once)
    splits, warps = _shape(strips, tiles)
    parts = counts = y
    if splits > 1:
        parts = torch.empty(strips * groups * splits * at_once * SIDE, dtype=torch.float32, device=x.device)
        counts = torch.zeros(strips * groups, dtype=torch.int32, device=x.device)
    kernel = _kernel("multiply", x.device, n, at_once, half=x.dtype == torch.float16)
    held = [_aligned(words), words if offsets is None else offsets, x, y if bias is None else bias, y, parts, counts]
    with torch.cuda.device(x.device):
        kernel(
            grid=(strips, splits, groups),
            block=(warps * SIDE, 1, 1),
            args=[*held, rows, columns, tokens, tiles, splits, int(bias is not None)],
            stream=torch.cuda.current_stream(),
        )
    return y


def _shape(strips: int, tiles: int) -> tuple[int, int]:
    """Return into how many parts the columns are split, and the warps of a block; both depend on the matrix alone."""
    splits = 1 if strips >= _FULL_GRID else max(1, min(8, _FULL_GRID // strips, tiles // _MOST_WARPS))
    each = -(-tiles // splits)
    warps = 4
    while warps < _MOST_WARPS and warps * 4 <= each:
        warps *= 2
    return splits, warps


def expand(words: Tensor, offsets: Tensor | None, rows: int, columns: int, n: int, dtype: torch.dtype) -> Tensor:
    """Return the dense matrix, (rows, columns); arguments as for :func:`linear`."""
    out = torch.empty(rows, columns, dtype=dtype, device=words.device)
    strips, tiles = -(-rows // SIDE), -(-columns // SIDE)
    kernel = _kernel("expand", words.device, n, 1, half=dtype == torch.float16)
    with torch.cuda.device(words.device):
        kernel(
            grid=(-(-strips * tiles // 8), 1, 1),
            block=(256, 1, 1),
            args=[_aligned(words), words if offsets is None else offsets, out, rows, columns, tiles, strips * tiles],
            stream=torch.cuda.current_stream(),
        )
    return out


def _aligned(words: Tensor) -> Tensor:
    """Return the words at an address that is a multiple of 16, which vector loads need; a copy if they are not."""
    return words if words.data_ptr() % 16 == 0 else words.clone()
