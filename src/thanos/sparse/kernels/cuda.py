"""Products of packed matrices on CUDA devices: kernels in CUDA C, compiled by the NVRTC that torch carries."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from thanos.sparse.kernels.tuned import FEW, MANY, Launch, device_settings, launch_for
from thanos.sparse.tiles import SIDE

_MOST_MATRICES = 4
"""Matrices of one launch."""

_TOKENS_OF_MANY = 16
"""Most tokens of one pass of the kernel for many tokens; up to 8, a pass of half the size suffices."""

_LEAST_CAPABILITY = (8, 0)
"""The kernels use instructions of this compute capability."""

_CLUSTERS = (9, 0)
"""Blocks can share their sums from this compute capability on; below, columns are not split."""

_NO_STRIP = (1 << 31) - 1


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
        _kernel(FEW, device, 16, 1, Launch(2, 1, 16), half=False)
    except (RuntimeError, OSError) as error:
        return f"the kernels cannot be compiled ({str(error).strip().splitlines()[0]})"
    return ""


@cache
def _kernel(name: str, device: torch.device, n: int, tokens: int, launch: Launch, *, half: bool) -> Any:
    """Compile a kernel of ``packed.cu`` for a device, once in a process."""
    macros = {"N": n, "B": tokens, "U": launch.flight, "SPLITS": launch.splits, "HALF": int(half)}
    source = (Path(__file__).parent / "packed.cu").read_text(encoding="utf-8")
    lines = [f"#define {key} {value}" for key, value in macros.items()]
    with torch.cuda.device(device):
        compiled: Any = torch.cuda._compile_kernel  # private, but in all releases that are supported
        # Some releases put 'extern "C"' before a source that does not begin with it.
        return compiled("\n".join(['extern "C" {}', *lines, source]), name)


def linears(
    x: Tensor,
    words: Sequence[Tensor],
    offsets: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    rows: Sequence[int],
    n: int,
) -> list[Tensor]:
    """Return x Wᵀ + bias for each of a few packed matrices of one kind, by one launch.

    Args:
        x: (tokens, columns), contiguous, bfloat16 or float16, the dtype of the packed values.
        words: the tiles of each matrix, int32, on the device of x; at most 4.
        offsets: for ``bitmap``, int32; None for ``fixed``.
        biases: (rows,) in the dtype of x, or None.
        rows: of each matrix.
        n: values a row of each tile; 0 for ``bitmap``.

    Returns:
        (tokens, rows) for each matrix.
    """
    settings = device_settings(_device_name(x.device))
    if len(x) > settings.most_tokens:
        parts = zip(words, offsets, biases, rows, strict=True)
        return [by_library(x, *part, n, settings.expanded_bytes) for part in parts]
    family = FEW if len(x) <= settings.few_tokens else MANY
    strips = sum(-(-count // SIDE) for count in rows)
    launch = launch_for(_device_name(x.device), family, n, strips, -(-x.shape[1] // SIDE))
    return multiply(x, words, offsets, biases, rows, n, family, launch)


@cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


@cache
def _has_clusters(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= _CLUSTERS


def multiply(
    x: Tensor,
    words: Sequence[Tensor],
    offsets: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    rows: Sequence[int],
    n: int,
    family: str,
    launch: Launch,
) -> list[Tensor]:
    """Run one of the kernels.

    The other arguments are those of :func:`linears`. ``family`` is :data:`~thanos.sparse.kernels.tuned.FEW`, a lane a row, or
    ``MANY``, for tensor cores; ``launch`` says how the work is divided.
    """
    tokens, columns = x.shape
    outputs = [torch.empty(tokens, count, dtype=x.dtype, device=x.device) for count in rows]
    if not tokens:
        return outputs
    if family == FEW:
        at_once = 1 if tokens == 1 else 2 if tokens == 2 else 4
    else:
        at_once = _TOKENS_OF_MANY // (2 if tokens <= _TOKENS_OF_MANY // 2 else 1)
    if not _has_clusters(x.device):
        launch = launch._replace(splits=1)
    strips = [-(-count // SIDE) for count in rows]
    firsts = [sum(strips[:index]) if index < len(strips) else _NO_STRIP for index in range(1, _MOST_MATRICES)]
    held = [_aligned(one) for one in words]
    stand_ins: list[Sequence[Tensor | None]] = [held, offsets, biases, outputs]
    pointers = [one for several in stand_ins for one in _fill(several, held[0])]
    flags = sum(1 << index for index, bias in enumerate(biases) if bias is not None)
    arguments = [*pointers, *_fill(rows, 0), *firsts, flags, x, columns, tokens, -(-columns // SIDE)]
    if family == MANY:
        arguments.append(int(columns % 8 == 0 and x.data_ptr() % 16 == 0))
    with torch.cuda.device(x.device):
        kernel = _kernel(family, x.device, n, at_once, launch, half=x.dtype == torch.float16)
        kernel(
            grid=(sum(strips), launch.splits, -(-tokens // at_once)),
            block=(launch.warps * SIDE, 1, 1),
            args=arguments,
            stream=torch.cuda.current_stream(),
        )
    return outputs


def _fill(values: Sequence[Any], other: Any) -> list[Any]:
    """Return one value for each matrix of a launch; those that are absent are never used."""
    there = [other if value is None else value for value in values]
    return there + [other] * (_MOST_MATRICES - len(there))


def by_library(
    x: Tensor, words: Tensor, offsets: Tensor | None, bias: Tensor | None, rows: int, n: int, expanded_bytes: int
) -> Tensor:
    """Return the product by the library, of some rows after another that are expanded.

    ``expanded_bytes`` is that of the rows that are expanded at once: few enough, and they stay in the last cache. The other
    arguments are those of :func:`linears`.
    """
    columns = x.shape[1]
    step = max(1, expanded_bytes // (SIDE * columns * x.element_size())) * SIDE
    if step >= rows:
        return F.linear(x, expand(words, offsets, 0, rows, columns, n, x.dtype), bias)
    out = torch.empty(len(x), rows, dtype=x.dtype, device=x.device)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        part = expand(words, offsets, first // SIDE, last - first, columns, n, x.dtype)
        if bias is None:
            torch.mm(x, part.T, out=out[:, first:last])
        else:
            torch.addmm(bias[first:last], x, part.T, out=out[:, first:last])
    return out


def expand(
    words: Tensor, offsets: Tensor | None, strip: int, rows: int, columns: int, n: int, dtype: torch.dtype
) -> Tensor:
    """Return rows of the dense matrix, (rows, columns), from a strip on; other arguments as for :func:`linears`."""
    out = torch.empty(rows, columns, dtype=dtype, device=words.device)
    tiles = -(-columns // SIDE)
    count = -(-rows // SIDE) * tiles
    if offsets is None:
        words = words[strip * tiles * (SIDE + SIDE * n // 2) :]
    with torch.cuda.device(words.device):
        kernel = _kernel("expand", words.device, n, 1, Launch(1, 1, 8), half=dtype == torch.float16)
        kernel(
            grid=(-(-count // 8), 1, 1),
            block=(256, 1, 1),
            args=[
                _aligned(words),
                words if offsets is None else offsets[strip * tiles :],
                out,
                *(rows, columns, tiles, count),
                int(columns % 8 == 0),
            ],
            stream=torch.cuda.current_stream(),
        )
    return out


def _aligned(words: Tensor) -> Tensor:
    """Return the words at an address that is a multiple of 16, which vector loads need; a copy if they are not."""
    return words if words.data_ptr() % 16 == 0 else words.clone()
