"""Torch operators for products: ``thanos::packed_linear`` with a packed matrix, ``thanos::packed_linears`` with several.

``thanos::dense_linear`` is the product of a few tokens with a matrix that stays dense in a packed model, on a CPU.

They have an implementation for each type of device and one for fake tensors, so that ``torch.compile`` and CUDA graphs work.
The operators have no derivative. The functions :func:`packed_linear` and :func:`packed_linears` have one, with respect to input
and bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from thanos.sparse.derivative import DerivedProduct, is_derived
from thanos.sparse.formats import PackedSpec, PackedWeight, decode, decode_strips
from thanos.sparse.kernels import cpu, dense, lacking
from thanos.sparse.kernels.tuned import MOST_MATRICES
from thanos.sparse.tiles import SIDE, tile_words
from thanos.system.library_warnings import warn_once

_DTYPES = (torch.bfloat16, torch.float16)

_STRIPS_ENTRIES = 1 << 20
"""Number of entries that are decoded at once if no kernel multiplies the packed matrix: 2 MiB."""

_LIBRARY = torch.library.Library("thanos", "FRAGMENT")
_LIBRARY.define("packed_linear(Tensor x, Tensor words, Tensor? offsets, Tensor? bias, SymInt rows, SymInt n) -> Tensor")
_LIBRARY.define(
    "packed_linears(Tensor x, Tensor[] words, Tensor?[] offsets, Tensor?[] biases, SymInt[] rows, SymInt n) -> Tensor[]"
)
_LIBRARY.define("packed_input_gradient(Tensor grad, Tensor words, Tensor? offsets, SymInt columns, SymInt n) -> Tensor")
_LIBRARY.define("dense_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def packed_linear(x: Tensor, words: Tensor, offsets: Tensor | None, bias: Tensor | None, rows: int, n: int) -> Tensor:
    """Return x Wᵀ + bias for a packed W whose content was checked; see :func:`~thanos.sparse.storage.check_weight`.

    Args:
        x: (..., columns), bfloat16 or float16: the dtype of W's values.
        words: W's tiles, int32.
        offsets: W's offsets if it is ``bitmap``, else None.
        bias: (rows,) in the dtype of x, or None.
        rows: number of rows of W.
        n: number of values per row of each tile; 0 for ``bitmap``.

    Returns:
        (..., rows) in the dtype of x. Sums are float32.

    Raises:
        RuntimeError: the arguments do not fit together. A wrong number of columns is not detected if it gives as many tiles.
    """
    if is_derived(x, bias):
        return DerivedProduct.apply(x, words, offsets, bias, rows, n)
    return _OPERATOR(x, words, offsets, bias, rows, n)


def packed_linears(
    x: Tensor,
    words: Sequence[Tensor],
    offsets: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    rows: Sequence[int],
    n: int,
) -> list[Tensor]:
    """Return the products of several packed matrices with the same x, on CUDA by one launch.

    The bits of the results are those of :func:`packed_linear` for one matrix of the total size.

    Args:
        x: (..., columns), bfloat16 or float16: the dtype of the values.
        words: the tiles of each matrix, int32; at most :data:`~thanos.sparse.kernels.tuned.MOST_MATRICES`.
        offsets: the offsets of each matrix if they are ``bitmap``, else None for each.
        biases: the bias of each matrix, (rows,) in the dtype of x, or None.
        rows: number of rows of each matrix.
        n: number of values per row of each tile, the same in all; 0 for ``bitmap``.

    Returns:
        (..., rows) for each matrix in the dtype of x. Sums are float32.

    Raises:
        RuntimeError: the arguments do not fit together; see :func:`packed_linear`.
    """
    if is_derived(x, *biases):
        return [packed_linear(x, *part, n) for part in zip(words, offsets, biases, rows, strict=True)]
    return _OPERATOR_OF_SEVERAL(x, list(words), list(offsets), list(biases), list(rows), n)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x Wᵀ + bias for a dense W, by this package's kernel where it is faster than the library. It has no derivative.

    Args:
        x: (..., columns).
        weight: W, (rows, columns), in the dtype of x.
        bias: (rows,) in the dtype of x, or None.

    Returns:
        (..., rows) in the dtype of x.
    """
    return _OPERATOR_OF_DENSE(x, weight, bias)


def _check(x: Tensor, words: Tensor, offsets: Tensor | None, bias: Tensor | None, rows: int, n: int) -> None:
    """Raise a RuntimeError unless the arguments fit together. Otherwise a kernel could read beyond the end of a tensor."""
    device, dtype = x.device, x.dtype
    sound = dtype in _DTYPES and x.dim() and _is_vector(words, torch.int32, device)
    if sound:
        tiles = -(-rows // SIDE) * -(-x.shape[-1] // SIDE)
        if offsets is None:
            sound = 1 <= n <= SIDE and words.numel() == tiles * tile_words(n)
        else:
            sound = n == 0 and _is_vector(offsets, torch.int32, device) and offsets.numel() == tiles + 1
    if bias is not None:
        sound = sound and _is_vector(bias, dtype, device) and bias.numel() == rows
    if not sound:
        kind = f"{n} of {SIDE}" if offsets is None else f"bitmap with {tuple(offsets.shape)} {offsets.dtype} offsets"
        end = "no bias" if bias is None else f"a bias {tuple(bias.shape)} {bias.dtype}"
        raise RuntimeError(
            f"an input {tuple(x.shape)} {x.dtype} on {x.device} does not fit a packed matrix of {rows} rows, {kind}, with "
            f"{tuple(words.shape)} {words.dtype} words on {words.device} and {end}"
        )


def _is_vector(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> bool:
    return tensor.dtype is dtype and tensor.dim() == 1 and tensor.device == device and tensor.is_contiguous()


def _check_several(
    x: Tensor,
    words: list[Tensor],
    offsets: list[Tensor | None],
    biases: list[Tensor | None],
    rows: list[int],
    n: int,
) -> None:
    if not len(words) == len(offsets) == len(biases) == len(rows) <= MOST_MATRICES:
        raise RuntimeError(
            f"a joint product takes lists of equal length, at most {MOST_MATRICES}; got lengths "
            f"{len(words)}, {len(offsets)}, {len(biases)} and {len(rows)}"
        )
    for part in zip(words, offsets, biases, rows, strict=True):
        _check(x, *part, n)


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which the library multiplies in the dtype of its operands, as the kernels do."""
    return torch.autocast(device.type, enabled=False) if torch.amp.is_autocast_available(device.type) else nullcontext()


@torch.no_grad()
def _by_parts(x: Tensor, words: Tensor, offsets: Tensor | None, bias: Tensor | None, rows: int, n: int) -> Tensor:
    """Decode a few strips at a time and let the library multiply by them: on any device, for any number of tokens."""
    _check(x, words, offsets, bias, rows, n)
    spec = PackedSpec("fixed" if offsets is None else "bitmap", rows, x.shape[-1], x.dtype, n, words.numel())
    packed, flat = PackedWeight(spec, words, offsets), x.reshape(-1, x.shape[-1])
    out = x.new_empty(len(flat), rows)
    step = max(1, _STRIPS_ENTRIES // (SIDE * max(1, spec.columns)))
    with _without_autocast(x.device):
        for first in range(0, spec.strips, step):
            part = decode_strips(packed, first, min(first + step, spec.strips))
            here = slice(SIDE * first, SIDE * first + len(part))
            out[:, here] = F.linear(flat, part, None if bias is None else bias[here])
    return out.view(*x.shape[:-1], rows)


def _say_slow(device: torch.device, reason: str) -> None:
    warn_once(
        f"packed layers run on {device.type} without a kernel ({reason}): every call decodes their weights, which is slow; "
        "model.dequantize() makes them dense"
    )


def _elsewhere(x: Tensor, words: Tensor, offsets: Tensor | None, bias: Tensor | None, rows: int, n: int) -> Tensor:
    """The product on a device that is neither a CPU nor CUDA."""
    _say_slow(x.device, lacking(x.device))
    return _by_parts(x, words, offsets, bias, rows, n)


def _on_cpu(x: Tensor, words: Tensor, offsets: Tensor | None, bias: Tensor | None, rows: int, n: int) -> Tensor:
    _check(x, words, offsets, bias, rows, n)
    if reason := cpu.lacking():
        _say_slow(x.device, reason)
    if reason or x.numel() > cpu.MOST_TOKENS * x.shape[-1]:
        return _by_parts(x, words, offsets, bias, rows, n)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    return cpu.linear(flat, words, offsets, bias, rows, n).view(*x.shape[:-1], rows)


def _input_gradient(grad: Tensor, words: Tensor, offsets: Tensor | None, columns: int, n: int) -> Tensor:
    """Return grad W, (..., columns), by the library: W is decoded whole."""
    rows = grad.shape[-1]
    spec = PackedSpec("fixed" if offsets is None else "bitmap", rows, columns, grad.dtype, n, words.numel())
    with _without_autocast(grad.device):
        return grad @ decode(PackedWeight(spec, words, offsets))


def _dense_on_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return dense.linear(x, weight, bias) if dense.serves(x, weight, bias) else F.linear(x, weight, bias)


def _dense_by_library(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def _on_cuda(x: Tensor, words: Tensor, offsets: Tensor | None, bias: Tensor | None, rows: int, n: int) -> Tensor:
    return _several_on_cuda(x, [words], [offsets], [bias], [rows], n)[0]


def _several_on_cuda(
    x: Tensor,
    words: list[Tensor],
    offsets: list[Tensor | None],
    biases: list[Tensor | None],
    rows: list[int],
    n: int,
) -> list[Tensor]:
    from thanos.sparse.kernels import cuda

    if reason := cuda.lacking(x.device):
        _say_slow(x.device, reason)
        parts = zip(words, offsets, biases, rows, strict=True)
        return [_by_parts(x, *part, n) for part in parts]
    _check_several(x, words, offsets, biases, rows, n)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    results = cuda.linears(flat, words, offsets, biases, rows, n)
    return [one.view(*x.shape[:-1], count) for one, count in zip(results, rows, strict=True)]


def _one_by_one(
    x: Tensor,
    words: list[Tensor],
    offsets: list[Tensor | None],
    biases: list[Tensor | None],
    rows: list[int],
    n: int,
) -> list[Tensor]:
    return [_OPERATOR(x, *part, n) for part in zip(words, offsets, biases, rows, strict=True)]


def _fake(x: Tensor, words: Tensor, offsets: Tensor | None, bias: Tensor | None, rows: int, n: int) -> Tensor:
    _check(x, words, offsets, bias, rows, n)
    return x.new_empty(*x.shape[:-1], rows)


def _fake_several(
    x: Tensor,
    words: list[Tensor],
    offsets: list[Tensor | None],
    biases: list[Tensor | None],
    rows: list[int],
    n: int,
) -> list[Tensor]:
    _check_several(x, words, offsets, biases, rows, n)
    return [x.new_empty(*x.shape[:-1], count) for count in rows]


def _fake_gradient(grad: Tensor, words: Tensor, offsets: Tensor | None, columns: int, n: int) -> Tensor:
    del words, offsets, n
    return grad.new_empty(*grad.shape[:-1], columns)


def _fake_dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    del bias
    return x.new_empty(*x.shape[:-1], weight.shape[0])


# ``torch.library.custom_op`` would add about 30 µs of Python to each call, as much as a small layer takes.
_LIBRARY.impl("packed_linear", _elsewhere, "CompositeExplicitAutograd")
_LIBRARY.impl("packed_linear", _on_cpu, "CPU")
_LIBRARY.impl("packed_linear", _on_cuda, "CUDA")
_LIBRARY.impl("packed_linears", _one_by_one, "CompositeExplicitAutograd")
_LIBRARY.impl("packed_linears", _several_on_cuda, "CUDA")
_LIBRARY.impl("packed_input_gradient", _input_gradient, "CompositeExplicitAutograd")
_LIBRARY.impl("dense_linear", _dense_by_library, "CompositeExplicitAutograd")
_LIBRARY.impl("dense_linear", _dense_on_cpu, "CPU")
torch.library.register_fake("thanos::packed_input_gradient", _fake_gradient, lib=_LIBRARY)
torch.library.register_fake("thanos::dense_linear", _fake_dense, lib=_LIBRARY)
torch.library.register_fake("thanos::packed_linear", _fake, lib=_LIBRARY)
torch.library.register_fake("thanos::packed_linears", _fake_several, lib=_LIBRARY)
_OPERATOR = torch.ops.thanos.packed_linear.default
_OPERATOR_OF_SEVERAL = torch.ops.thanos.packed_linears.default
_OPERATOR_OF_DENSE = torch.ops.thanos.dense_linear.default
