"""The two packed formats of a weight matrix, and the choice between them by bytes.

Both divide the matrix into strips of 32 rows, and a strip into tiles of 32 × 32 (:mod:`thanos.sparse.tiles`), which are stored
from left to right. The matrix is padded with zeros to multiples of 32.

``fixed``
    Every tile stores the same number n of values per row. It suits n:m patterns whose m divides 32: 16:32, 2:4, 4:8 and 8:16
    have n = 16 and take 0.5625 of the bytes of a dense 16-bit matrix.
``bitmap``
    Each tile stores as many values per row as its fullest row has, so tiles have different sizes, and ``offsets`` has the start
    of each. It suits matrices without a pattern. A matrix with half of its weights at random positions takes 0.75 of the dense
    bytes and not 0.5625, since the fullest of 32 rows has more values than the mean row.

A row with fewer values than its tile stores also stores zeros, at its first columns without a value.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from thanos.sparse import tiles
from thanos.sparse.kernels import encoder
from thanos.sparse.tiles import SIDE, tile_words
from thanos.system.background import on_threads

Format = Literal["fixed", "bitmap"]


UNIT = 16
"""Number of 32-bit words in a unit of ``offsets``, 64 bytes; every tile takes a whole number of units."""

_CHUNK_ENTRIES = 1 << 21
"""Number of entries that are encoded or decoded at once; they fit into the processor's caches."""

_BITMAP_GAIN = 0.97
"""The bitmap format is chosen if it takes at most this fraction of the bytes of the fixed format, whose kernel is simpler."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes of packed values, by name."""


@dataclass(frozen=True, slots=True)
class PackedSpec:
    """Format, sizes and dtype of a packed matrix.

    Attributes:
        format: ``fixed`` or ``bitmap``.
        rows: rows of the dense matrix (outputs).
        columns: columns of the dense matrix (inputs).
        dtype: dtype of the values, bfloat16 or float16.
        n: number of values per row of each tile; 0 for ``bitmap``, whose tiles differ.
        words: number of 32-bit words of all tiles.
    """

    format: Format
    rows: int
    columns: int
    dtype: torch.dtype
    n: int
    words: int

    @property
    def strips(self) -> int:
        """Number of strips of 32 rows."""
        return -(-self.rows // SIDE)

    @property
    def tiles(self) -> int:
        """Number of tiles of a strip."""
        return -(-self.columns // SIDE)

    @property
    def offsets(self) -> int:
        """Number of entries of ``offsets``: one per tile, and the end; 0 for ``fixed``."""
        return self.strips * self.tiles + 1 if self.format == "bitmap" else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the packed matrix."""
        return 4 * (self.words + self.offsets)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense matrix."""
        return self.rows * self.columns * self.dtype.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A packed matrix.

    Attributes:
        spec: format, sizes and dtype.
        words: the tiles, (spec.words,) int32.
        offsets: for ``bitmap``: first unit of 64 bytes of each tile, and the end, (spec.offsets,) int32; None for ``fixed``.
    """

    spec: PackedSpec
    words: Tensor
    offsets: Tensor | None


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

    return torch.cat(on_threads(fullest, weight.view(torch.int16).split(_chunk_rows(columns))))


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
    """Pack a matrix; :func:`decode` returns it bit for bit.

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
    counts = fullest.reshape(-1).to(torch.int64)
    if spec.format == "fixed":
        if int(counts.max()) > spec.n:
            raise ValueError(f"a row of 32 columns holds {int(counts.max())} entries, more than n = {spec.n}")
        counts = torch.full_like(counts, spec.n)
    offsets = torch.cat([counts.new_zeros(1), torch.cumsum(counts + SIDE // UNIT, 0)]) * UNIT
    words = torch.empty(int(offsets[-1]), dtype=torch.int32)
    units = (offsets // UNIT).to(torch.int32) if spec.format == "bitmap" else None
    if encoder.available(weight):
        encoder.encode(weight.contiguous(), counts.to(torch.uint8), offsets, words)
        return PackedWeight(spec, words, units)
    step = _chunk_rows(shape[1])

    def put(row: int) -> None:
        bits = _tiles_of(weight[row : row + step].view(torch.int16))
        tile = row // SIDE * spec.tiles
        n = counts[tile : tile + len(bits)]
        kept = bits != 0
        stored = tiles.fill_up(kept, tiles.count_flags(kept).squeeze(-1), n)
        for value, where in _by_count(n):
            encoded = tiles.encode_tiles(bits[where], stored[where], value)
            _put(words, offsets[tile : tile + len(bits)][where], encoded)

    on_threads(put, range(0, shape[0], step))
    return PackedWeight(spec, words, units)


def decode(packed: PackedWeight) -> Tensor:
    """Return the dense matrix, (rows, columns), on the device of the packed one."""
    spec = packed.spec
    out = torch.empty(spec.rows, spec.columns, dtype=spec.dtype, device=packed.words.device)
    step = max(1, _chunk_rows(spec.columns) // SIDE)

    def put(first: int) -> None:
        part = decode_strips(packed, first, min(first + step, spec.strips))
        out[SIDE * first : SIDE * first + len(part)] = part

    firsts = range(0, spec.strips, step)
    if out.device.type == "cpu":
        on_threads(put, firsts)
    else:
        for first in firsts:
            put(first)
    return out


def decode_strips(packed: PackedWeight, first: int, last: int) -> Tensor:
    """Return the rows of strips ``first`` to ``last`` − 1, (at most 32 · (last − first), columns)."""
    spec = packed.spec
    bits = _tiles_at(packed, torch.arange(first * spec.tiles, last * spec.tiles, device=packed.words.device))
    rows = bits.view(-1, spec.tiles, SIDE, SIDE).transpose(1, 2).reshape(-1, spec.tiles * SIDE)
    return rows[: spec.rows - SIDE * first, : spec.columns].contiguous().view(spec.dtype)


def padding_is_zero(packed: PackedWeight) -> bool:
    """Return whether all entries beyond the matrix's last row and column are zero. The masks must be valid."""
    spec, device = packed.spec, packed.words.device
    clean = True
    if spec.rows % SIDE:
        last = torch.arange((spec.strips - 1) * spec.tiles, spec.strips * spec.tiles, device=device)
        clean = not bool(_tiles_at(packed, last)[:, spec.rows % SIDE :].any())
    if spec.columns % SIDE and clean:
        last = torch.arange(spec.tiles - 1, spec.strips * spec.tiles, spec.tiles, device=device)
        clean = not bool(_tiles_at(packed, last)[:, :, spec.columns % SIDE :].any())
    return clean


def tile_counts(packed: PackedWeight) -> Tensor:
    """Return the number of values per row of each tile, (strips · tiles,) int64, from ``offsets`` or the spec."""
    spec = packed.spec
    if packed.offsets is None:
        return torch.full((spec.strips * spec.tiles,), spec.n, device=packed.words.device)
    return packed.offsets.long().diff() - SIDE // UNIT


def mask_words(packed: PackedWeight) -> Iterator[tuple[int, Tensor]]:
    """Yield n and the mask words, (tiles, 32) int32, of the tiles that store n values per row, for each n."""
    for n, where in _by_count(tile_counts(packed)):
        yield n, _rows_of_words(packed, where, SIDE)


def _tiles_at(packed: PackedWeight, indices: Tensor) -> Tensor:
    """Return the entries' bits of tiles by index, (tiles, 32, 32) int16."""
    out = torch.empty(len(indices), SIDE, SIDE, dtype=torch.int16, device=indices.device)
    for n, where in _by_count(tile_counts(packed)[indices]):
        out[where] = tiles.decode_tiles(_rows_of_words(packed, indices[where], tile_words(n)), n)
    return out


def _rows_of_words(packed: PackedWeight, indices: Tensor | slice, length: int) -> Tensor:
    """Return the first ``length`` words of tiles by index, (tiles, length) int32."""
    if packed.offsets is None:
        return packed.words.view(-1, tile_words(packed.spec.n))[indices, :length]
    first = packed.offsets[:-1][indices].long() * UNIT
    return packed.words[first[:, None] + torch.arange(length, device=first.device)]


def _put(words: Tensor, first: Tensor, encoded: Tensor) -> None:
    """Write tiles (B, k) at their first words."""
    length = encoded.shape[1]
    start, count = int(first[0]), len(first)
    if int(first[-1]) - start == (count - 1) * length:  # one after another, as in the fixed format
        words[start : start + count * length] = encoded.view(-1)
    else:
        words[(first[:, None] + torch.arange(length)).view(-1)] = encoded.view(-1)


def _by_count(counts: Tensor) -> Iterator[tuple[int, Tensor | slice]]:
    """Yield each distinct count, and the indices of the tiles with it."""
    present = counts.unique().tolist()
    for value in present:
        yield value, slice(None) if len(present) == 1 else (counts == value).nonzero().squeeze(1)


def _chunk_rows(columns: int) -> int:
    """Return the number of rows that are encoded or decoded at once, a multiple of 32."""
    return max(1, _CHUNK_ENTRIES // max(1, columns * SIDE)) * SIDE


def _tiles_of(bits: Tensor) -> Tensor:
    """Return the tiles of a matrix (rows, columns) int16 in order, (tiles, 32, 32), padded with zeros."""
    columns = bits.shape[1]
    across, down = -(-columns // SIDE), -(-len(bits) // SIDE)
    if bits.shape != (down * SIDE, across * SIDE):
        whole = bits.new_zeros(down * SIDE, across * SIDE)
        whole[: len(bits), :columns] = bits
        bits = whole
    return bits.reshape(down, SIDE, across, SIDE).transpose(1, 2).reshape(-1, SIDE, SIDE)
