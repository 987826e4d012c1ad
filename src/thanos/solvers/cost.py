"""Operations and bytes of a layer's solve, of which each method's file states its own; docs/cost.md derives them."""

from __future__ import annotations

from dataclasses import dataclass

from thanos.patterns.base import Pattern

STEPS = 10
"""Steps of the rows' iteration where inputs are many (docs/cost.md)."""

_SLAB = 1024
"""Columns of a product that a squared output norm holds at once (layer_error.py)."""

_ROW_VECTORS = 10
"""Matrices of rows by block size that the rows' iteration holds at once (masked_cg.py)."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Work of one part of a solve.

    Attributes:
        flops: additions and multiplications.
        bytes: read and written in the device's memory, each operand once per pass over it.
    """

    flops: float
    bytes: float

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Return the least time on a device of these rates: arithmetic and memory traffic overlap at best."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


@dataclass(frozen=True, slots=True)
class Size:
    """The size of a layer's solve.

    Attributes:
        rows: c.
        columns: b.
        block: B, at most b.
        steps: of the rows' iteration.
    """

    rows: int
    columns: int
    block: int
    steps: float = STEPS

    @property
    def entries(self) -> int:
        """c·b."""
        return self.rows * self.columns

    @property
    def rest(self) -> float:
        """The columns that are left, summed over the blocks."""
        b, size = float(self.columns), float(self.block)
        return b * (b + size) / (2 * size)

    @property
    def image_bytes(self) -> int:
        """Bytes of the product with the Hessian that a squared output norm holds at once."""
        return 4 * self.rows * min(_SLAB, self.columns)


def scoring(pattern: Pattern, size: Size) -> dict[str, Cost]:
    """Return the work of scoring and choosing once."""
    del pattern
    c, b = float(size.rows), float(size.columns)
    return {"scores": Cost(2 * c * b, 12 * c * b)}


def block_update(size: Size) -> Cost:
    """Return the work of carrying each block's change to the columns on its right."""
    c, block = float(size.rows), float(size.block)
    return Cost(2 * c * block * size.rest, 8 * c * size.rest)


def sorting_bytes(pattern: Pattern, size: Size) -> int:
    """Return what sorting scores by rows holds: scores, values and 64-bit positions."""
    del pattern
    return (4 + 4 + 8) * size.entries


def compensating_bytes(size: Size, scores: int = 0) -> int:
    """Return what a method that goes by blocks holds: its own matrices, or its result and the change of the weight.

    Args:
        size: of the layer.
        scores: bytes of the scores of all entries, where the method keeps them.
    """
    inside = (4 + 1) * size.entries + scores
    inside += max(3 * size.entries if scores else 0, 4 * _ROW_VECTORS * size.rows * size.block)
    after = (4 + 1 + 4 + 4) * size.entries + size.image_bytes
    return max(inside, after)
