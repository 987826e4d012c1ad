"""Products of packed matrices on CUDA devices: kernels in CUDA C, compiled at run time by the NVRTC in torch."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from thanos.sparse.kernels.tuned import FEW, MANY, MOST_MATRICES, Launch, Settings, device_settings, launch_for, plan
from thanos.sparse.tiles import SIDE, UNIT, tile_words

_LEAST_CAPABILITY = (8, 0)
"""Least compute capability, whose instructions the kernels use."""

_CLUSTERS = (9, 0)
"""Least compute capability at which blocks can share their sums; below it, columns are not split."""

_NO_CONTEXT = 201
"""Error code of the driver in a thread that has not used the device yet."""

_FILES = {
    FEW: ("instructions", "tile", "product", "few"),
    MANY: ("instructions", "tile", "product", "gather", "many"),
    "expand": ("instructions", "tile", "gather", "expand"),
}
"""Kernel → the files, in order, that make up its source."""

_ROWS_OF_PART = 256
"""Parts of a matrix that is expanded have a multiple of this many rows: no tile of the library's product is cut."""

_OUTPUTS_OF_PART = 1 << 22
"""Least number of outputs of a part, so that its product occupies a large device: 128 tiles of 256 × 128."""

_TILES_OF_EXPAND = 8
"""Number of tiles of a block of the kernel ``expand``, one for each warp."""


@cache
def lacking(device: torch.device) -> str:
    """Return the reason why a device cannot run the kernels; empty if it can. One kernel is compiled to find out."""
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
    """Compile a kernel for a device, once in a process."""
    with torch.cuda.device(device):
        compiled: Any = torch.cuda._compile_kernel  # private, but in all releases that are supported
        return compiled(source(name, n=n, tokens=tokens, flight=flight, splits=splits, half=half), name)


def source(name: str, *, n: int, tokens: int, flight: int, splits: int, half: bool) -> str:
    """Return the source of a kernel with the values of its macros."""
    macros = {"N": n, "B": tokens, "U": flight, "SPLITS": splits, "HALF": int(half)}
    lines = [f"#define {key} {value}" for key, value in macros.items()]
    files = (Path(__file__).parent / f"{file}.cu" for file in _FILES[name])
    # Some releases of torch put 'extern "C"' before a source that does not begin with it.
    return "\n".join(['extern "C" {}', *lines, *(file.read_text(encoding="utf-8") for file in files)])


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
        rows: number of rows of each matrix.
        n: number of values per row of each tile; 0 for ``bitmap``.

    Returns:
        (tokens, rows) for each matrix.
    """
    device = _device_name(x.device)
    settings = device_settings(device)
    if len(x) > settings.most_tokens:
        matrices = zip(words, offsets, biases, rows, strict=True)
        with torch.autocast("cuda", enabled=False):  # the library keeps the dtype of its operands, as the kernels do
            return [by_library(x, *one, n, parts_of(len(x), one[-1], settings.parts)) for one in matrices]
    family = FEW if len(x) <= settings.few_tokens else MANY
    strips, tiles = sum(-(-count // SIDE) for count in rows), -(-x.shape[1] // SIDE)
    units = sum(one.numel() for one in words) // (UNIT * strips * tiles)
    launch = launch_for(device, family, n, units, strips, tiles)
    return multiply(x, words, offsets, biases, rows, n, family, launch, settings.pass_tokens)


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
    most: int = Settings().pass_tokens,
) -> list[Tensor]:
    """Run one of the kernels.

    ``family`` is :data:`~thanos.sparse.kernels.tuned.FEW` (one row per lane) or ``MANY`` (tensor cores), and ``launch`` the
    division of the work. ``most`` is the number of tokens that ``MANY`` takes in a pass. The other arguments are those of
    :func:`linears`.
    """
    tokens, columns = x.shape
    outputs = [torch.empty(tokens, count, dtype=x.dtype, device=x.device) for count in rows]
    if not tokens:
        return outputs
    how = plan(tokens, tuple(rows), family, launch, most, clusters=_has_clusters(x.device))
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
    """Return one value per matrix of a launch, padded to :data:`MOST_MATRICES` with zeros, which the kernel does not use."""
    numbers = list(values)
    return numbers + [0] * (MOST_MATRICES - len(numbers))


@cache
def _driver() -> Any:
    """Return the library of the device's driver."""
    return torch.cuda._utils._get_gpu_runtime_library()


def _run(kernel: Any, grid: tuple[int, int, int], block: tuple[int, int, int], values: Sequence[int]) -> None:
    """Launch a kernel on the current stream of the current device.

    Calling the compiled kernel directly takes several times as long, longer than a small product.

    Args:
        kernel: the result of :func:`_kernel`.
        grid: number of blocks in each dimension.
        block: number of threads in each dimension.
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


def parts_of(tokens: int, rows: int, most: int) -> int:
    """Return into how many parts a matrix with that many rows is cut for the library, at most ``most``."""
    return max(1, min(most, tokens * rows // _OUTPUTS_OF_PART))


@cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of the library's products. It has priority over the kernels that expand, which use what is free."""
    return torch.cuda.Stream(device, priority=-1)


@torch.no_grad()  # for the library's ``out``
def by_library(
    x: Tensor, words: Tensor, offsets: Tensor | None, bias: Tensor | None, rows: int, n: int, parts: int
) -> Tensor:
    """Return the product by the library. The matrix is expanded in parts, each while the part before is multiplied.

    The other arguments are those of :func:`linears`. With one part the result is that of the dense matrix, bit for bit.
    """
    columns = x.shape[1]
    step = -(-rows // (parts * _ROWS_OF_PART)) * _ROWS_OF_PART
    if step >= rows:
        return F.linear(x, expand(words, offsets, 0, rows, columns, n, x.dtype), bias)
    out = torch.empty(len(x), rows, dtype=x.dtype, device=x.device)
    stream, second = torch.cuda.current_stream(x.device), _second_stream(x.device)
    held = []  # keeps the parts until this stream has waited for their products: only then may it use their memory again
    try:
        for first in range(0, rows, step):
            here = slice(first, min(first + step, rows))
            part = expand(words, offsets, first // SIDE, here.stop - first, columns, n, x.dtype)
            held.append(part)
            second.wait_stream(stream)
            with torch.cuda.stream(second):
                if bias is None:
                    torch.mm(x, part.T, out=out[:, here])
                else:
                    torch.addmm(bias[here], x, part.T, out=out[:, here])
    finally:
        stream.wait_stream(second)
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
    """Return the words, or a copy if their address is not a multiple of 16, which vector loads need."""
    return words if words.data_ptr() % 16 == 0 else words.clone()
