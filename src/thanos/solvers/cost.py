"""Operations and bytes of a layer's solve. Each method's file has its own formulas; docs/cost.md lists them."""

from __future__ import annotations

from dataclasses import dataclass

from thanos.patterns.base import Pattern
from thanos.patterns.budget import Request

STEPS = 10
"""Assumed number of steps of the conjugate gradients in a block, s in docs/cost.md: enough for many calibration tokens."""


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
        sparsity: p, the fraction of the entries that are removed.
    """

    rows: int
    columns: int
    block: int
    steps: float = STEPS
    sparsity: float = 0.5

    @property
    def entries(self) -> int:
        """The number of entries, c·b."""
        return self.rows * self.columns

    @property
    def rest(self) -> float:
        """Number of columns not yet processed, summed over the blocks; ``rest`` in docs/cost.md."""
        b, size = float(self.columns), float(self.block)
        return b * (b + size) / (2 * size)


def scoring(pattern: Pattern, size: Size) -> dict[str, Cost]:
    """Return the cost of computing and choosing all scores once."""
    del pattern
    c, b = float(size.rows), float(size.columns)
    return {"scores": Cost(2 * c * b, 12 * c * b)}


def removed_columns(pattern: Pattern, size: Size) -> int:
    """Return the number of columns that a pattern with ``whole_columns`` removes."""
    return pattern.budget(Request(size.rows, size.columns, size.sparsity, outlier_rows=0.0, keep_budget=False)).columns


def block_update(size: Size) -> Cost:
    """Return the cost of updating the columns on the right of each block."""
    c, block = float(size.rows), float(size.block)
    return Cost(2 * c * block * size.rest, 8 * c * size.rest)


def support_fit(size: Size, steps: float) -> Cost:
    """Return the cost of ``steps`` conjugate gradients on the support, and of three residuals: see ``support_cg.py``."""
    c, b = float(size.rows), float(size.columns)
    return Cost((steps + 3) * 2 * c * b**2, (steps + 3) * 4 * (10 * c * b + b**2))
