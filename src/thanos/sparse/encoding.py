"""Packing of dense matrices on the CPU: the choice between the formats by bytes, and encoding, whole or in parts."""

from __future__ import annotations

import torch
from torch import Tensor

from thanos.sparse import tiles
from thanos.sparse.formats import MOST_UNITS, PackedSpec, PackedWeight, by_size, chunk_rows
from thanos.sparse.kernels import encoder
from thanos.sparse.tiles import MOST_TAIL, SIDE, TAIL_COST, UNIT, tile_words
from thanos.system.background import on_threads

_BITMAP_GAIN = 0.97
"""The bitmap format is chosen if it takes at most this fraction of the bytes of the fixed format, whose kernel is simpler."""


def count_entries(weight: Tensor) -> Tensor:
    """Return, for each tile, the number of entries of its fullest row, and the best n and number of units of the tail.

    The best pair takes the fewest units, where a tail counts as :data:`~thanos.sparse.tiles.TAIL_COST` units more. Of several
    best pairs, the one with the largest n is returned. An entry counts unless all its bits are zero, so a negative zero counts.

    Args:
        weight: (rows, columns), bfloat16 or float16, on the CPU.

    Returns:
        (3, strips, tiles) uint8.
    """
    if encoder.available(weight):
        return encoder.count_entries(weight.contiguous())
    columns = weight.shape[1]
    across = -(-columns // SIDE)

    def count(part: Tensor) -> Tensor:
        kept = torch.zeros(-(-len(part) // SIDE) * SIDE, across * SIDE, dtype=torch.bool)
        torch.ne(part, 0, out=kept[: len(part), :columns])
        return _sizes_of(tiles.count_flags(kept).view(-1, SIDE, across))

    return torch.cat(on_threads(count, weight.view(torch.int16).split(chunk_rows(columns))), 1)


def _sizes_of(counts: Tensor) -> Tensor:
    """Return what :func:`count_entries` returns, from the numbers of entries by row and tile, (strips, 32, tiles) uint8."""
    fullest = counts.amax(1)
    best, tail, cost = fullest.clone(), torch.zeros_like(fullest), fullest.clone()
    surplus = torch.zeros_like(fullest, dtype=torch.int16)
    for n in range(SIDE - 1, -1, -1):
        surplus += (counts > n).sum(1, dtype=torch.int16)
        units = ((surplus + SIDE - 1) // SIDE).to(torch.uint8)
        better = (units <= MOST_TAIL) & (n + units + TAIL_COST < cost)
        best.masked_fill_(better, n)
        torch.where(better, units, tail, out=tail)
        torch.where(better, n + units + TAIL_COST, cost, out=cost)
    return torch.stack([fullest, best, tail])


def choose_format(counts: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> PackedSpec:
    """Return the spec of the format that suits a matrix better.

    That is ``bitmap`` if it takes at most :data:`_BITMAP_GAIN` of the bytes of ``fixed``, or if ``fixed`` would need n = 32. If
    the matrix is too large for ``bitmap``, it is ``fixed``. A last strip with fewer than 32 rows is ignored unless it is the
    only one: whatever the pattern, it takes fewer bytes in ``bitmap``.

    Args:
        counts: the result of :func:`count_entries`.
        shape: (rows, columns) of the matrix.
        dtype: dtype of the matrix.
    """
    count, most = counts[0].numel(), max(1, int(counts[0].max()))
    fixed = PackedSpec("fixed", *shape, dtype, most, count * tile_words(most))
    units = SIDE // UNIT * count + int(counts[1:].sum(dtype=torch.int64))
    bitmap = PackedSpec("bitmap", *shape, dtype, 0, UNIT * units)
    whole = counts[1:, : shape[0] // SIDE or None]
    mean = tile_words(0) + 1 + UNIT * whole.sum(dtype=torch.int64) / whole[0].numel()  # with the offset
    pays = most == SIDE or bool(mean <= _BITMAP_GAIN * tile_words(most))
    return bitmap if pays and units <= MOST_UNITS else fixed


def encode(weight: Tensor, spec: PackedSpec | None = None, counts: Tensor | None = None) -> PackedWeight:
    """Pack a matrix; :func:`~thanos.sparse.formats.decode` returns it bit for bit.

    Args:
        weight: (rows, columns), bfloat16 or float16, on the CPU.
        spec: the result of :func:`choose_format`; default: chosen now.
        counts: the result of :func:`count_entries`; default: counted now.

    Raises:
        ValueError: a tile has more entries than ``spec`` or ``counts`` say.
    """
    counts = count_entries(weight) if counts is None else counts
    shape = (weight.shape[0], weight.shape[1])
    spec = choose_format(counts, shape, weight.dtype) if spec is None else spec
    if (spec.rows, spec.columns, spec.dtype) != (*shape, weight.dtype):
        raise ValueError(f"{spec} is not the spec of a {weight.dtype} matrix {shape}")
    return PackedWeight(spec, encode_strips(weight, spec, counts), offsets_of(spec, counts))


def encode_strips(rows: Tensor, spec: PackedSpec, counts: Tensor) -> Tensor:
    """Return the words of some strips of a matrix, int32. The words of all strips, in order, are the words of the matrix.

    Args:
        rows: rows of the strips, (count, columns), on the CPU.
        spec: spec of the whole matrix.
        counts: the result of :func:`count_entries` for the strips.

    Raises:
        ValueError: a tile has more entries than ``spec`` or ``counts`` say.
    """
    n, tail, first = _stored_sizes(spec, counts)
    words = torch.empty(int(first[-1]), dtype=torch.int32)
    if encoder.available(rows):
        encoder.encode(rows.contiguous(), torch.stack([n, tail]), first, words)
        return words
    step = chunk_rows(spec.columns)

    def put(row: int) -> None:
        bits = _tiles_of(rows[row : row + step].view(torch.int16))
        here = slice(row // SIDE * spec.tiles, row // SIDE * spec.tiles + len(bits))
        kept = bits != 0
        stored = tiles.fill_up(kept, tiles.count_flags(kept).squeeze(-1), n[here].to(torch.int16))
        for value, units, where in by_size(n[here].long(), tail[here].long()):
            _put(words, first[here][where], tiles.encode_tiles(bits[where], stored[where], value, units))

    on_threads(put, range(0, len(rows), step))
    return words


def offsets_of(spec: PackedSpec, counts: Tensor) -> Tensor | None:
    """Return a packed matrix's ``offsets``; ``counts`` is the result of :func:`count_entries` for the whole matrix."""
    if spec.format == "fixed":
        return None
    _, tail, first = _stored_sizes(spec, counts)
    offsets = (first // UNIT * 4).to(torch.int32)
    offsets[:-1] += tail
    return offsets


def _stored_sizes(spec: PackedSpec, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each tile's values per row and units of the tail, uint8, and the first word of each tile and the end, int64."""
    fullest, n, tail = counts.reshape(3, -1)
    if spec.format == "fixed":
        if int(fullest.max()) > spec.n:
            raise ValueError(f"a row of a tile holds {int(fullest.max())} entries, more than n = {spec.n}")
        n, tail = torch.full_like(n, spec.n), torch.zeros_like(tail)
    sizes = (n.long() + tail + SIDE // UNIT) * UNIT
    return n, tail, torch.cat([sizes.new_zeros(1), torch.cumsum(sizes, 0)])


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
