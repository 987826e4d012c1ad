"""Encoding of packed matrices by the optional extension ``_encode``, written in C for processors with AVX-512."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from thanos.sparse.tiles import SIDE


@cache
def _extension() -> Any:
    """Return the extension, or None if it was not built or the processor cannot run it."""
    try:
        extension = import_module("thanos.sparse.kernels._encode")
    except ImportError:
        return None
    return extension if extension.support() else None


def available(weight: Tensor) -> bool:
    """Return whether the functions of this module can run for a matrix on this machine."""
    return weight.device.type == "cpu" and weight.element_size() == 2 and _extension() is not None


def fullest_rows(weight: Tensor) -> Tensor:
    """Return the number of entries of the fullest row of each tile, (strips, tiles) uint8.

    Args:
        weight: (rows, columns), 16 bits wide, contiguous, on the CPU.
    """
    rows, columns = weight.shape
    fullest = torch.zeros(-(-rows // SIDE), -(-columns // SIDE), dtype=torch.uint8)
    if weight.numel():
        _extension().run(weight.data_ptr(), rows, columns, fullest.data_ptr(), 0, 0, torch.get_num_threads())
    return fullest


def encode(weight: Tensor, counts: Tensor, offsets: Tensor, words: Tensor) -> None:
    """Write the tiles of a matrix.

    Args:
        weight: as for :func:`fullest_rows`.
        counts: number of values per row of each tile, (strips · tiles,) uint8.
        offsets: first word of each tile, and the end, (strips · tiles + 1,) int64.
        words: output for the tiles, (offsets[-1],) int32.

    Raises:
        ValueError: a row has more entries than its tile stores, or a tile stores more than 32.
    """
    if counts.numel() and int(counts.max()) > SIDE:
        raise ValueError(f"a tile of 32 columns cannot store {int(counts.max())} values a row")
    rows, columns = weight.shape
    addresses = (tensor.data_ptr() for tensor in (counts, offsets, words))
    if not _extension().run(weight.data_ptr(), rows, columns, *addresses, torch.get_num_threads()):
        raise ValueError("a row of 32 columns holds more entries than its tile stores")
