"""Tiles of 32 rows × 32 columns, the unit of both packed formats: their masks and their values as 32-bit words.

A tile that stores n values per row takes 32 + 16·n words: 32 mask words, one per row, then the values. The most significant bit
of a mask word is the tile's first column, and each word has exactly n bits set. The values of a row are in the order of its
columns. They are divided into pieces of 8, and the remainder into at most one piece each of 4, 2 and 1. A piece has the values
of row 0, then those of row 1, and so on to row 31. So the 32 lanes of a GPU's warp, one per row, read a contiguous range.

Values are handled as 16 bits and not as numbers, so negative zeros and NaN do not change. Letters: B tiles, n values per row.
Encoding runs on the CPU, decoding on any device.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SIDE = 32
"""Rows and columns of a tile."""

PIECES = (8, 4, 2, 1)
"""Sizes of the pieces, in values per row."""

_ONES = 0x0101010101010101
"""Factor that sums 8 bytes in the top byte."""


def tile_words(n: int) -> int:
    """Return the number of 32-bit words of a tile with ``n`` values per row."""
    return SIDE + SIDE * n // 2


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
    """Extend the mask of each row to ``n`` columns, by its first columns that are not kept.

    Args:
        kept: (B, 32, 32) bool.
        counts: kept columns of each row, (B, 32) uint8.
        n: values to store in each row of a tile: one number, or (B,).

    Returns:
        (B, 32, 32) bool; ``kept`` itself if no row lacks any.
    """
    wanted = n[:, None] if isinstance(n, Tensor) else n
    missing = (wanted - counts.to(torch.int16)).to(torch.int8)
    if not missing.any():
        return kept
    rank = torch.cumsum(~kept, -1, dtype=torch.int8)
    return kept | (rank <= missing[..., None])


def encode_tiles(bits: Tensor, stored: Tensor, n: int) -> Tensor:
    """Return the words of tiles.

    Args:
        bits: the entries' 16 bits, (B, 32, 32) int16.
        stored: which entries to store, (B, 32, 32) bool, ``n`` in each row.
        n: values a row, 0 to 32.

    Returns:
        (B, 32 + 16·n) int32.
    """
    masks = pack_bits(stored).squeeze(-1)
    if not n:
        return masks
    values = bits.reshape(-1).index_select(0, true_positions(stored)).view(-1, SIDE, n)
    parts = [values[:, :, first : first + size].reshape(len(values), -1) for first, size in pieces(n)]
    return torch.cat([masks, torch.cat(parts, 1).view(torch.int32)], 1)


def decode_tiles(words: Tensor, n: int) -> Tensor:
    """Return the entries' 16 bits, (B, 32, 32) int16, of tiles (B, 32 + 16·n) int32; entries that are not stored are zero.

    Each mask word must have ``n`` bits set.
    """
    count = len(words)
    out = torch.zeros(count, SIDE, SIDE, dtype=torch.int16, device=words.device)
    if not n or not count:
        return out
    stored = unpack_bits(words[:, :SIDE])
    values = words[:, SIDE:].contiguous().view(torch.int16)
    parts = [values[:, SIDE * first : SIDE * (first + size)].unflatten(1, (SIDE, size)) for first, size in pieces(n)]
    out.view(-1).index_copy_(0, true_positions(stored), torch.cat(parts, 2).view(-1))
    return out
