"""Tiles of 32 rows × 32 columns, the unit of both packed formats: their masks and their values as 32-bit words.

A tile that stores n values per row and a tail of t units takes 32 + 16·(n + t) words: 32 mask words, one per row, then the
first n values of every row, then the tail. The most significant bit of a mask word is the tile's first column, and each word
has at least n bits set. The values of a row are in the order of its columns. The first n are cut into pieces of 8, and what is
left of n into at most one piece each of 4, 2 and 1. A piece holds the values of row 0, then those of row 1, and so on to row
31: 32 lanes of a GPU's warp, a row each, read one contiguous range. The tail holds the surplus, the values of a row after its
n-th: those of row 0 first, without gaps, and zeros up to the end of its last unit of 32 values.

Values are 16 bits wide and are never interpreted as numbers here, so that negative zeros and NaN pass unchanged. Letters: B
tiles, n values per row, t units of the tail. Encoding runs on the CPU, decoding on any device.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SIDE = 32
"""Rows and columns of a tile."""

UNIT = 16
"""32-bit words of a unit, 64 bytes: 32 values. Every tile takes a whole number of units."""

MOST_TAIL = 2
"""Units of the longest tail: 64 values, two for each lane of a warp."""

TAIL_COST = 8
"""A tile gets a tail only if that saves more units than this.

This is the additional time of the CUDA kernel for a tail, measured with random weights on an H100 ("Tails" in
docs/results/packed.md).
"""

PIECES = (8, 4, 2, 1)
"""Sizes of the pieces, in values per row."""

_ONES = 0x0101010101010101
"""Factor that sums 8 bytes in the top byte."""


def tile_words(n: int, tail: int = 0) -> int:
    """Return the number of 32-bit words of a tile with ``n`` values per row and ``tail`` units of further values."""
    return SIDE + UNIT * (n + tail)


def pieces(n: int) -> list[tuple[int, int]]:
    """Return (first value, number of values) of each piece of a row with ``n`` values."""
    cut = [(8 * index, 8) for index in range(n // 8)]
    for size in PIECES[1:]:
        if n & size:
            first = sum(length for _, length in cut)
            cut.append((first, size))
    return cut


def pack_bits(flags: Tensor) -> Tensor:
    """Return mask words (…, k) int32 of bool flags (…, 32·k) on the CPU; the first flag becomes the highest bit."""
    octets = np.packbits(flags.numpy(), axis=-1)  # several times faster than tensor operations
    return torch.from_numpy(octets.view(">i4").astype("=i4"))


def unpack_bits(words: Tensor) -> Tensor:
    """Return bool flags (…, 32) of mask words (…) int32; the inverse of :func:`pack_bits`, on any device."""
    if words.device.type == "cpu":
        octets = np.ascontiguousarray(words.numpy()[..., None].astype(">i4")).view(np.uint8)
        return torch.from_numpy(np.unpackbits(octets, axis=-1)).view(torch.bool)
    shifts = torch.arange(SIDE - 1, -1, -1, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & 1).bool()


def true_positions(flags: Tensor) -> Tensor:
    """Return the flat positions of true flags in order, int64. NumPy is used on the CPU, where ``Tensor.nonzero`` is slow."""
    if flags.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(flags.numpy()))
    return flags.reshape(-1).nonzero().squeeze(-1)


def count_flags(flags: Tensor) -> Tensor:
    """Return the number of true flags in each group of 32 of (…, 32·k) bool, contiguous: (…, k) uint8."""
    sums = (flags.view(torch.int64) * _ONES) >> 56
    return sums.to(torch.uint8).unflatten(-1, (-1, 4)).sum(-1, dtype=torch.uint8)


def count_bits(words: Tensor) -> Tensor:
    """Return the number of bits set in each int32 word, as int32 of the same shape."""
    x = words - ((words >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24) & 0x3F


def fill_up(kept: Tensor, counts: Tensor, n: Tensor | int) -> Tensor:
    """Add the first columns that are not kept to the mask of each row that has fewer than ``n``, until it has ``n``.

    Args:
        kept: (B, 32, 32) bool.
        counts: kept columns of each row, (B, 32) uint8.
        n: values to store in each row of a tile: one number, or (B,).

    Returns:
        (B, 32, 32) bool; ``kept`` itself if no row lacks any.
    """
    wanted = n[:, None] if isinstance(n, Tensor) else n
    missing = (wanted - counts.to(torch.int16)).to(torch.int8)
    if not (missing > 0).any():
        return kept
    rank = torch.cumsum(~kept, -1, dtype=torch.int8)
    return kept | (rank <= missing[..., None])


def encode_tiles(bits: Tensor, stored: Tensor, n: int, tail: int = 0) -> Tensor:
    """Return the words of tiles.

    Args:
        bits: the entries' 16 bits, (B, 32, 32) int16.
        stored: which entries to store, (B, 32, 32) bool, at least ``n`` in each row.
        n: number of values per row, 0 to 32.
        tail: number of units of the tail, 0 to 2.

    Returns:
        (B, 32 + 16·(n + tail)) int32.

    Raises:
        ValueError, RuntimeError: a tile has more surplus than its tail holds.
    """
    parts, flat = [pack_bits(stored).squeeze(-1)], bits.reshape(-1)
    surplus = _surplus(stored, n) if tail else torch.zeros_like(stored)
    if n:
        values = flat.index_select(0, true_positions(stored & ~surplus)).view(-1, SIDE, n)
        cut = [values[:, :, first : first + size].reshape(len(values), -1) for first, size in pieces(n)]
        parts.append(torch.cat(cut, 1).view(torch.int32))
    if tail:
        used, end = surplus.sum((1, 2)), flat.new_zeros(len(bits), SIDE * tail)
        if bool((used > SIDE * tail).any()):
            raise ValueError(
                f"a tile has {int(used.max())} values after the first {n} of its rows, more than {tail} units hold"
            )
        end.view(-1).index_copy_(0, _places(used, tail), flat.index_select(0, true_positions(surplus)))
        parts.append(end.view(torch.int32))
    return torch.cat(parts, 1)


def decode_tiles(words: Tensor, n: int, tail: int = 0) -> Tensor:
    """Return the entries' 16 bits, (B, 32, 32) int16, of tiles (B, 32 + 16·(n + tail)) int32. Entries not stored are zero.

    Each mask word must have at least ``n`` bits set, and the tail must have room for all others together.
    """
    count = len(words)
    out = torch.zeros(count, SIDE, SIDE, dtype=torch.int16, device=words.device)
    if not n + tail or not count:
        return out
    stored = unpack_bits(words[:, :SIDE])
    values = words[:, SIDE:].contiguous().view(torch.int16)
    flat = out.view(-1)
    if tail:
        surplus = _surplus(stored, n)
        places = _places(surplus.sum((1, 2)), tail)
        flat.index_copy_(0, true_positions(surplus), values[:, SIDE * n :].reshape(-1).index_select(0, places))
        stored = stored & ~surplus
    if n:
        parts = [
            values[:, SIDE * first : SIDE * (first + size)].unflatten(1, (SIDE, size)) for first, size in pieces(n)
        ]
        flat.index_copy_(0, true_positions(stored), torch.cat(parts, 2).view(-1))
    return out


def _surplus(stored: Tensor, n: int) -> Tensor:
    """Return which stored entries (B, 32, 32) come after the n-th of their row."""
    return stored & (torch.cumsum(stored, -1, dtype=torch.int8) > n)


def _places(used: Tensor, tail: int) -> Tensor:
    """Return the flat positions in the tails, (B, 32·t), of the first ``used`` values of each, (B,)."""
    return true_positions(torch.arange(SIDE * tail, device=used.device) < used[:, None])
