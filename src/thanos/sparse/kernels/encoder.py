"""Encoding of packed matrices by the optional extension ``_encode``, written in C for processors with AVX-512."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from thanos.sparse.kernels.extensions import load
from thanos.sparse.tiles import MOST_TAIL, SIDE


@cache
def _extension() -> Any:
    """Return the extension, or None if it cannot be used or the processor cannot run it."""
    extension, _ = load("_encode")
    return extension if extension is not None and extension.support() else None


def available(weight: Tensor) -> bool:
    """Return whether the functions of this module can run for a matrix on this machine."""
    return weight.device.type == "cpu" and weight.element_size() == 2 and _extension() is not None


def count_entries(weight: Tensor) -> Tensor:
    """Return, for each tile, the number of entries of its fullest row, and the best n and number of units of the tail.

    See :func:`thanos.sparse.encoding.count_entries`.

    Args:
        weight: (rows, columns), 16 bits wide, contiguous, on the CPU.

    Returns:
        (3, strips, tiles) uint8.
    """
    rows, columns = weight.shape
    counts = torch.zeros(3, -(-rows // SIDE), -(-columns // SIDE), dtype=torch.uint8)
    if weight.numel():
        _extension().run(weight.data_ptr(), rows, columns, counts.data_ptr(), 0, 0, torch.get_num_threads())
    return counts


def encode(weight: Tensor, sizes: Tensor, offsets: Tensor, words: Tensor) -> None:
    """Write the tiles of a matrix.

    Args:
        weight: as for :func:`count_entries`.
        sizes: number of values per row and of units of the tail of each tile, (2, strips · tiles) uint8, contiguous.
        offsets: first word of each tile, and the end, (strips · tiles + 1,) int64.
        words: output for the tiles, (offsets[-1],) int32.

    Raises:
        ValueError: a tile has more entries than its size holds, or a size is impossible.
    """
    most = sizes.amax(1).tolist() if sizes.numel() else [0, 0]
    if most[0] > SIDE or most[1] > MOST_TAIL:
        raise ValueError(
            f"a tile cannot store {most[0]} values in each of its rows of 32, or a tail of {most[1]} units"
        )
    rows, columns = weight.shape
    addresses = (tensor.data_ptr() for tensor in (sizes, offsets, words))
    if not _extension().run(weight.data_ptr(), rows, columns, *addresses, torch.get_num_threads()):
        raise ValueError("a tile has more entries than it stores")
