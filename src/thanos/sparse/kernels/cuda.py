"""Products of packed matrices on CUDA devices: kernels in CUDA C, compiled by the NVRTC that torch carries."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from thanos.sparse.kernels.tuned import FEW, MANY, MOST_MATRICES, Launch, device_settings, launch_for, plan
from thanos.sparse.tiles import SIDE, tile_words

_LEAST_CAPABILITY = (8, 0)
"""The kernels use instructions of this compute capability."""

_CLUSTERS = (9, 0)
"""Blocks can share their sums from this compute capability on; below, columns are not split."""

_NO_CONTEXT = 201
"""What the driver answers in a thread that has not used the device yet."""

_TILES_OF_EXPAND = 8
"""Tiles of a block of the kernel that expands: one for each warp."""


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
        _kernel(FEW, device, n=16, tokens=1, flight=2, splits=1, half=False)
    except (RuntimeError, OSError) as error:
        return f"the kernels cannot be compiled ({' '.join(str(error).split())[:200]})"
    return ""


@cache
def _kernel(name: str, device: torch.device, *, n: int, tokens: int, flight: int, splits: int, half: bool) -> Any:
    """Compile a kernel of ``packed.cu`` for a device, once in a process."""
    with torch.cuda.device(device):
        compiled: Any = torch.cuda._compile_kernel  # private, but in all releases that are supported
        return compiled(source(n=n, tokens=tokens, flight=flight, splits=splits, half=half), name)


def source(*, n: int, tokens: int, flight: int, splits: int, half: bool) -> str:
    """Return ``packed.cu`` with the values of its macros."""
    macros = {"N": n, "B": tokens, "U": flight, "SPLITS": splits, "HALF": int(half)}
    lines = [f"#define {key} {value}" for key, value in macros.items()]
    text = (Path(__file__).parent / "packed.cu").read_text(encoding="utf-8")
    # Some releases of torch put 'extern "C"' before a source that does not begin with it.
    return "\n".join(['extern "C" {}', *lines, text])


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
    device = _device_name(x.device)
    settings = device_settings(device)
    if len(x) > settings.most_tokens:
        parts = zip(words, offsets, biases, rows, strict=True)
        with torch.autocast("cuda", enabled=False):  # the library keeps the dtype of its operands, as the kernels do
            return [by_library(x, *part, n, settings.expanded_bytes) for part in parts]
    family = FEW if len(x) <= settings.few_tokens else MANY
    strips = sum(-(-count // SIDE) for count in rows)
    launch = launch_for(device, family, n, strips, -(-x.shape[1] // SIDE))
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
    how = plan(tokens, tuple(rows), family, launch, clusters=_has_clusters(x.device))
    held = [_aligned(one) for one in words]
    tensors: list[Sequence[Tensor | None]] = [held, offsets, biases, outputs]
    pointers = [address for several in tensors for address in _fill(map(_address, several))]
    numbers = [columns, tokens, -(-columns // SIDE)]
    if family == MANY:
        numbers.append(int(columns % 8 == 0 and x.data_ptr() % 16 == 0))
    with torch.cuda.device(x.device):
        kernel = _kernel(
            family,
            x.device,
            n=n,
            tokens=how.at_once,
            flight=launch.flight,
            splits=how.grid[1],
            half=x.dtype == torch.float16,
        )
        _run(kernel, how.grid, how.block, [*pointers, *_fill(rows), *how.firsts, x.data_ptr(), *numbers])
    return outputs


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _fill(values: Iterable[int]) -> list[int]:
    """Return one value for each matrix that a launch can have: zero for those that it has not, which the kernel never uses."""
    there = list(values)
    return there + [0] * (MOST_MATRICES - len(there))


@cache
def _driver() -> Any:
    """Return the library of the device's driver."""
    return torch.cuda._utils._get_gpu_runtime_library()


def _run(kernel: Any, grid: tuple[int, int, int], block: tuple[int, int, int], values: Sequence[int]) -> None:
    """Launch a kernel on the current stream of the current device.

    The compiled kernel's own call takes several times as long, longer than a small product.

    Args:
        kernel: from :func:`_kernel`.
        grid: blocks in each dimension.
        block: threads in each dimension.
        values: the kernel's arguments: addresses, and whole numbers from 0 to 2³¹ − 1.
    """
    slots = (ctypes.c_uint64 * len(values))(*values)  # a parameter of 32 bits is the first half of its slot
    first = ctypes.addressof(slots)
    parameters = (ctypes.c_void_p * len(values))(*range(first, first + 8 * len(values), 8))
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    arguments = (kernel.func, *grid, *block, 0, stream, parameters, None)
    result = _driver().cuLaunchKernel(*arguments)
    if result == _NO_CONTEXT:
        torch.cuda.synchronize()  # gives this thread the context
        result = _driver().cuLaunchKernel(*arguments)
    torch.cuda._utils._check_cuda(result)


@torch.no_grad()  # for the library's ``out``
def by_library(
    x: Tensor, words: Tensor, offsets: Tensor | None, bias: Tensor | None, rows: int, n: int, expanded_bytes: int
) -> Tensor:
    """Return the product by the library, for which some rows are expanded at a time.

    ``expanded_bytes`` is the most that is expanded at once: a part that is small enough stays in the last cache. The other
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
        first = strip * tiles * tile_words(n)
        words = words[first : first + count * tile_words(n)]
    else:
        offsets = offsets[strip * tiles :]
    held = _aligned(words)
    values = [_address(one) for one in (held, offsets, out)] + [rows, columns, tiles, count, int(columns % 8 == 0)]
    with torch.cuda.device(words.device):
        kernel = _kernel("expand", words.device, n=n, tokens=1, flight=1, splits=1, half=dtype == torch.float16)
        grid = (-(-count // _TILES_OF_EXPAND), 1, 1)
        _run(kernel, grid, (_TILES_OF_EXPAND * SIDE, 1, 1), values)
    return out


def _aligned(words: Tensor) -> Tensor:
    """Return the words at an address that is a multiple of 16, which vector loads need; a copy if they are not."""
    return words if words.data_ptr() % 16 == 0 else words.clone()
