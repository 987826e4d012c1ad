"""The two packed formats of a weight matrix: what a packed matrix is, and how it is read.

Both divide the matrix into strips of 32 rows, and a strip into tiles of 32 × 32 (:mod:`thanos.sparse.tiles`), which are stored
from left to right. The matrix is padded with zeros to multiples of 32.

``fixed``
    Every tile stores the same number n of values per row and has no tail. It suits n:m patterns whose m divides 32: 16:32 and
    all 2:4, 4:8 and 8:16 matrices have n = 16 and take 0.5625 of the bytes of a dense 16-bit matrix.
``bitmap``
    Tiles differ in n. The values of a row after the first n are in the tile's tail. ``offsets`` says where each tile begins and
    how long its tail is. It suits matrices without a pattern. The fullest of 32 random rows has more values than the mean row:
    a matrix that keeps half of its weights takes 0.75 of the dense bytes, not 0.5625. A tail makes a tile with few long rows
    smaller.

A row with fewer values than its tile stores is filled up: it also stores zeros, at its first columns that hold no value.
:mod:`thanos.sparse.encoding` makes packed matrices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from thanos.sparse import tiles
from thanos.sparse.tiles import SIDE, UNIT, tile_words
from thanos.system.background import on_threads

Format = Literal["fixed", "bitmap"]

VERSION = 2
"""Version of the layout. Increase it if a reader of the old layout would misread the new one.

Version 1 had no tails: an offset was the number of a tile's first unit. Now it is four times that, plus the tail's units.
"""

MOST_UNITS = (1 << 29) - 1
"""Units of the largest ``bitmap`` matrix, 32 GiB: four times as much must fit an offset of 32 bits."""

CHUNK_ENTRIES = 1 << 21
"""Entries of the strips that are encoded or decoded at once: few enough for the processor's caches."""

_PART_ENTRIES = 1 << 23
"""Entries of the parts in which a matrix is read from a file and written to another: 16 MiB."""

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
        version: version of the layout of the offsets. It differs from :data:`VERSION` only in a matrix just read from a file.
    """

    format: Format
    rows: int
    columns: int
    dtype: torch.dtype
    n: int
    words: int
    version: int = VERSION

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
        offsets: for ``bitmap``, (spec.offsets,) int32: for each tile four times the number of its first unit of 64 bytes, plus
            the number of units of its tail; at the end four times the number of all units. None for ``fixed``.
    """

    spec: PackedSpec
    words: Tensor
    offsets: Tensor | None


def strip_parts(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Yield (first, last) of consecutive strips, last excluded, so that a matrix can be handled in parts of limited size."""
    strips, step = -(-rows // SIDE), max(1, _PART_ENTRIES // (SIDE * max(1, columns)))
    for first in range(0, strips, step):
        yield first, min(first + step, strips)


def decode(packed: PackedWeight, first: int = 0, last: int | None = None) -> Tensor:
    """Return the dense matrix, (rows, columns), on the device of the packed one.

    With ``first`` and ``last``, return only the rows of strips ``first`` to ``last`` − 1.
    """
    spec = packed.spec
    last = spec.strips if last is None else last
    out = torch.empty(
        min(SIDE * last, spec.rows) - SIDE * first, spec.columns, dtype=spec.dtype, device=packed.words.device
    )
    step = max(1, chunk_rows(spec.columns) // SIDE)

    def put(strip: int) -> None:
        part = decode_strips(packed, strip, min(strip + step, last))
        out[SIDE * (strip - first) :][: len(part)] = part

    firsts = range(first, last, step)
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


def tile_sizes(packed: PackedWeight, indices: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the values per row and the units of the tail of the tiles ``indices`` (default: all), both int64."""
    spec = packed.spec
    if indices is None:
        indices = torch.arange(spec.strips * spec.tiles, device=packed.words.device)
    if packed.offsets is None:
        return torch.full_like(indices, spec.n), torch.zeros_like(indices)
    begin, end = packed.offsets[indices].long(), packed.offsets[indices + 1].long()
    tail = begin & 3
    return (end >> 2) - (begin >> 2) - SIDE // UNIT - tail, tail


def masks_and_tails(packed: PackedWeight) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield n, mask words (tiles, 32) int32 and tails (tiles, 32·t) int16 of the tiles that have the same n and t."""
    for n, tail, where in by_size(*tile_sizes(packed)):
        masks = _rows_of_words(packed, where, 0, SIDE)
        yield n, masks, _rows_of_words(packed, where, tile_words(n), tile_words(n, tail)).contiguous().view(torch.int16)


def by_size(n: Tensor, tail: Tensor) -> Iterator[tuple[int, int, Tensor | slice]]:
    """Yield n, the units of the tail, and the indices of the tiles that have them, for each pair that occurs."""
    key = 4 * n + tail
    present = key.unique().tolist()
    for value in present:
        yield value >> 2, value & 3, slice(None) if len(present) == 1 else (key == value).nonzero().squeeze(1)


def chunk_rows(columns: int) -> int:
    """Return how many rows are encoded or decoded at once; they are whole strips."""
    return max(1, CHUNK_ENTRIES // max(1, columns * SIDE)) * SIDE


def _tiles_at(packed: PackedWeight, indices: Tensor) -> Tensor:
    """Return the entries' bits of tiles by index, (tiles, 32, 32) int16."""
    out = torch.empty(len(indices), SIDE, SIDE, dtype=torch.int16, device=indices.device)
    for n, tail, where in by_size(*tile_sizes(packed, indices)):
        words = _rows_of_words(packed, indices[where], 0, tile_words(n, tail))
        out[where] = tiles.decode_tiles(words, n, tail)
    return out


def _rows_of_words(packed: PackedWeight, indices: Tensor | slice, start: int, end: int) -> Tensor:
    """Return words ``start`` to ``end`` − 1 of tiles by index, (tiles, end − start) int32."""
    if packed.offsets is None:
        return packed.words.view(-1, tile_words(packed.spec.n))[indices, start:end]
    first = (packed.offsets[:-1][indices].long() >> 2) * UNIT
    return packed.words[first[:, None] + torch.arange(start, end, device=first.device)]
