"""Operations and bytes of a layer's solve. Each method's file has its own formulas; docs/cost.md derives them."""

from __future__ import annotations

from dataclasses import dataclass

from thanos.patterns.base import Pattern

STEPS = 10
"""Steps of the conjugate gradients for many inputs (docs/cost.md)."""

_SLAB = 1024
"""Columns of the product with the Hessian that are held at once for squared output norms (layer_error.py)."""

_ROW_VECTORS = 10
"""Number of (c, B) matrices that the conjugate gradients hold at once (masked_cg.py)."""


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of one part of a solve.

    Attributes:
        flops: number of additions and multiplications.
        bytes: bytes read and written in the device's memory, each operand once per pass over it.
    """

    flops: float
    bytes: float

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Return the least time on a device with these rates: at best, arithmetic and memory traffic overlap."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


@dataclass(frozen=True, slots=True)
class Size:
    """The size of a layer's solve.

    Attributes:
        rows: c, the number of output rows.
        columns: b, the number of input columns.
        block: B, the number of columns in a block, at most b.
        steps: number of steps of the conjugate gradients.
    """

    rows: int
    columns: int
    block: int
    steps: float = STEPS

    @property
    def entries(self) -> int:
        """The number of entries, c·b."""
        return self.rows * self.columns

    @property
    def rest(self) -> float:
        """R, the sum over the blocks of the columns that remain."""
        b, size = float(self.columns), float(self.block)
        return b * (b + size) / (2 * size)

    @property
    def image_bytes(self) -> int:
        """Bytes of the product with the Hessian that are held at once for squared output norms."""
        return 4 * self.rows * min(_SLAB, self.columns)


def scoring(pattern: Pattern, size: Size) -> dict[str, Cost]:
    """Return the cost of computing and choosing all scores once."""
    del pattern
    c, b = float(size.rows), float(size.columns)
    return {"scores": Cost(2 * c * b, 12 * c * b)}


def block_update(size: Size) -> Cost:
    """Return the cost of updating the columns on the right of each block."""
    c, block = float(size.rows), float(size.block)
    return Cost(2 * c * block * size.rest, 8 * c * size.rest)


def sorting_bytes(pattern: Pattern, size: Size) -> int:
    """Return the bytes that a sort of the scores by rows holds: scores, sorted values and 64-bit indices."""
    del pattern
    return (4 + 4 + 8) * size.entries


def compensating_bytes(size: Size, scores: int = 0) -> int:
    """Return the bytes that a blockwise method holds: the peak of the solve and of the error measurement after it.

    The solve holds the method's own matrices. The measurement holds the result and the change of the weight.

    Args:
        size: size of the layer.
        scores: bytes of the scores of all entries, if the method keeps them.
    """
    inside = (4 + 1) * size.entries + scores
    inside += max(3 * size.entries if scores else 0, 4 * _ROW_VECTORS * size.rows * size.block)
    after = (4 + 1 + 4 + 4) * size.entries + size.image_bytes
    return max(inside, after)


def support_fit(size: Size, steps: float) -> Cost:
    """Return the cost of ``steps`` conjugate gradients on the support, and of three residuals: see ``support_cg.py``."""
    c, b = float(size.rows), float(size.columns)
    return Cost((steps + 3) * 2 * c * b**2, (steps + 3) * 4 * (10 * c * b + b**2))


def support_fit_bytes(size: Size) -> int:
    """Return the bytes that the conjugate gradients on the support hold.

    They hold the start, the first residual and six matrices of their own, and two masks; the measurement of the error after
    them holds the result and the change of the weight.
    """
    return max((4 * 8 + 2) * size.entries, (4 + 1 + 4 + 4) * size.entries + size.image_bytes)
