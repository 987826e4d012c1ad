"""Packing of dense matrices on the CPU: the choice between the formats by bytes, and encoding, whole or in parts."""

from __future__ import annotations

import torch
from torch import Tensor

from thanos.sparse import tiles
from thanos.sparse.formats import UNIT, PackedSpec, PackedWeight, by_count, chunk_rows
from thanos.sparse.kernels import encoder
from thanos.sparse.tiles import SIDE, tile_words
from thanos.system.background import on_threads

_BITMAP_GAIN = 0.97
"""The bitmap format is chosen if it takes at most this fraction of the bytes of the fixed format, whose kernel is simpler."""


def fullest_rows(weight: Tensor) -> Tensor:
    """Return the number of entries of the fullest row of each tile, (strips, tiles) uint8.

    An entry counts unless all its bits are zero, so a negative zero counts.

    Args:
        weight: (rows, columns), bfloat16 or float16, on the CPU.
    """
    if encoder.available(weight):
        return encoder.fullest_rows(weight.contiguous())
    columns = weight.shape[1]
    across = -(-columns // SIDE)

    def fullest(part: Tensor) -> Tensor:
        kept = torch.zeros(-(-len(part) // SIDE) * SIDE, across * SIDE, dtype=torch.bool)
        torch.ne(part, 0, out=kept[: len(part), :columns])
        return tiles.count_flags(kept).view(-1, SIDE, across).amax(1)

    return torch.cat(on_threads(fullest, weight.view(torch.int16).split(chunk_rows(columns))))


def choose_format(fullest: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> PackedSpec:
    """Return the format with fewer bytes.

    Args:
        fullest: from :func:`fullest_rows`.
        shape: (rows, columns) of the matrix.
        dtype: of the matrix.
    """
    count, most = fullest.numel(), max(1, int(fullest.max()))
    fixed = PackedSpec("fixed", *shape, dtype, most, count * tile_words(most))
    words = SIDE * count + UNIT * int(fullest.sum(dtype=torch.int64))
    bitmap = PackedSpec("bitmap", *shape, dtype, 0, words)
    return bitmap if bitmap.nbytes <= _BITMAP_GAIN * fixed.nbytes or most == SIDE else fixed


def encode(weight: Tensor, spec: PackedSpec | None = None, fullest: Tensor | None = None) -> PackedWeight:
    """Pack a matrix; :func:`~thanos.sparse.formats.decode` returns it bit for bit.

    Args:
        weight: (rows, columns), bfloat16 or float16, on the CPU.
        spec: from :func:`choose_format`; default: chosen now.
        fullest: from :func:`fullest_rows`; default: counted now.

    Raises:
        ValueError: a row of a tile has more entries than ``spec.n``.
    """
    fullest = fullest_rows(weight) if fullest is None else fullest
    shape = (weight.shape[0], weight.shape[1])
    spec = choose_format(fullest, shape, weight.dtype) if spec is None else spec
    if (spec.rows, spec.columns, spec.dtype) != (*shape, weight.dtype):
        raise ValueError(f"{spec} is not the spec of a {weight.dtype} matrix {shape}")
    return PackedWeight(spec, encode_strips(weight, spec, fullest), unit_offsets(spec, fullest))


def encode_strips(rows: Tensor, spec: PackedSpec, fullest: Tensor) -> Tensor:
    """Return the words of some strips of a matrix, int32. Those of all strips, one after another, are the matrix's.

    Args:
        rows: of the strips, (count, columns), on the CPU.
        spec: of the matrix.
        fullest: of the strips, from :func:`fullest_rows`.

    Raises:
        ValueError: a row of a tile has more entries than ``spec.n``.
    """
    counts, offsets = _stored_counts(spec, fullest)
    words = torch.empty(int(offsets[-1]), dtype=torch.int32)
    if encoder.available(rows):
        encoder.encode(rows.contiguous(), counts.to(torch.uint8), offsets, words)
        return words
    step = chunk_rows(spec.columns)

    def put(row: int) -> None:
        bits = _tiles_of(rows[row : row + step].view(torch.int16))
        tile = row // SIDE * spec.tiles
        n = counts[tile : tile + len(bits)]
        kept = bits != 0
        stored = tiles.fill_up(kept, tiles.count_flags(kept).squeeze(-1), n)
        for value, where in by_count(n):
            encoded = tiles.encode_tiles(bits[where], stored[where], value)
            _put(words, offsets[tile : tile + len(bits)][where], encoded)

    on_threads(put, range(0, len(rows), step))
    return words


def unit_offsets(spec: PackedSpec, fullest: Tensor) -> Tensor | None:
    """Return a packed matrix's ``offsets``; ``fullest`` is from :func:`fullest_rows`, of the whole matrix."""
    return (_stored_counts(spec, fullest)[1] // UNIT).to(torch.int32) if spec.format == "bitmap" else None


def _stored_counts(spec: PackedSpec, fullest: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values a row of each tile, and the first word of each tile and the end, int64."""
    counts = fullest.reshape(-1).to(torch.int64)
    if spec.format == "fixed":
        if int(counts.max()) > spec.n:
            raise ValueError(f"a row of 32 columns holds {int(counts.max())} entries, more than n = {spec.n}")
        counts = torch.full_like(counts, spec.n)
    return counts, torch.cat([counts.new_zeros(1), torch.cumsum(counts + SIDE // UNIT, 0)]) * UNIT


def _put(words: Tensor, first: Tensor, encoded: Tensor) -> None:
    """Write tiles (B, k) at their first words."""
    length = encoded.shape[1]
    start, count = int(first[0]), len(first)
    if int(first[-1]) - start == (count - 1) * length:  # one after another, as in the fixed format
        words[start : start + count * length] = encoded.view(-1)
    else:
        words[(first[:, None] + torch.arange(length)).view(-1)] = encoded.view(-1)


def _tiles_of(bits: Tensor) -> Tensor:
    """Return the tiles of a matrix (rows, columns) int16 in order, (tiles, 32, 32), padded with zeros."""
    columns = bits.shape[1]
    across, down = -(-columns // SIDE), -(-len(bits) // SIDE)
    if bits.shape != (down * SIDE, across * SIDE):
        whole = bits.new_zeros(down * SIDE, across * SIDE)
        whole[: len(bits), :columns] = bits
        bits = whole
    return bits.reshape(down, SIDE, across, SIDE).transpose(1, 2).reshape(-1, SIDE, SIDE)
