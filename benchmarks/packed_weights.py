"""Random weights in a pattern, dense and packed, for the benchmarks."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from thanos.sparse.encoding import encode
from thanos.sparse.formats import PackedWeight

PATTERNS = {"16:32": 0.0, "50 %": 0.5, "60 %": 0.6, "70 %": 0.7}
"""Name of a pattern → sparsity of random zeros; 0 for 16:32."""

ROTATED_BYTES = {"cuda": 3 << 27, "cpu": 3 << 26}
"""Bytes of packed weights among which the products rotate: more than the last-level cache holds."""


_DRAWN_ROWS = (1024, 768, 576)
"""Rows of a large matrix that are drawn; the others repeat them."""


class Weights(NamedTuple):
    """Several copies of one matrix, dense and packed, so that the copy of the next call is in no cache.

    Attributes:
        dense: (rows, columns).
        packed: the same matrix.
        words: its tiles.
    """

    dense: list[Tensor]
    packed: PackedWeight
    words: list[Tensor]


def make(shape: tuple[int, int], sparsity: float, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Return random weights: with random zeros if ``sparsity`` is above 0, else in 16:32."""
    weight = torch.randn(shape, device=device)
    if sparsity:
        return weight.masked_fill(torch.rand(shape, device=device) < sparsity, 0).to(dtype)
    rank = torch.rand(shape[0], shape[1] // 32, 32, device=device).argsort(-1).argsort(-1)
    return weight.masked_fill((rank >= 16).view(shape), 0).to(dtype)


def repeated(weight: Tensor, rows: int, device: str) -> tuple[Tensor, PackedWeight]:
    """Return a dense matrix that repeats the rows of another, and the same packed: many rows are slow to pack."""
    packed, times = encode(weight.cpu()), -(-rows // len(weight))
    if times == 1:
        offsets = None if packed.offsets is None else packed.offsets.to(device)
        return weight.to(device), PackedWeight(packed.spec, packed.words.to(device), offsets)
    if rows % len(weight) or len(weight) % 32:
        raise ValueError(f"{rows} rows are not a multiple of {len(weight)}")
    spec = dataclasses.replace(packed.spec, rows=rows, words=times * packed.spec.words)
    words, offsets = packed.words.to(device).repeat(times), None
    if packed.offsets is not None:
        begins = torch.arange(times, dtype=torch.int32)[:, None] * packed.offsets[-1]
        offsets = torch.cat([(packed.offsets[:-1] + begins).view(-1), packed.offsets[-1:] * times]).to(device)
    return weight.to(device).repeat(times, 1), PackedWeight(spec, words, offsets)


def drawn_rows(rows: int) -> int:
    """Return how many rows of a matrix are drawn; the others repeat them."""
    return next((count for count in _DRAWN_ROWS if rows % count == 0 and rows > count), rows)


def weights(shape: tuple[int, int], pattern: str, dtype: torch.dtype, device: str, *, dense: bool = True) -> Weights:
    """Return copies of random weights of a shape in a pattern, as many as exceed the last-level cache."""
    drawn = make((drawn_rows(shape[0]), shape[1]), PATTERNS[pattern], dtype, device)
    first, packed = repeated(drawn, shape[0], device)
    count = max(2, min(48, ROTATED_BYTES[torch.device(device).type] // packed.spec.nbytes + 1))
    words = [packed.words, *(packed.words.clone() for _ in range(count - 1))]
    return Weights([first, *(first.clone() for _ in range(count - 1))] if dense else [first], packed, words)
