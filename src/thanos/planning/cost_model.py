"""Cost models: floating-point operations and bytes of a layer's solve, as docs/cost.md derives them."""

from __future__ import annotations

from dataclasses import dataclass

from thanos.patterns.columns import Columns
from thanos.patterns.parse import Pattern
from thanos.patterns.unstructured import Unstructured

STEPS = 10
"""Steps of the rows' iteration where inputs are many (docs/cost.md)."""


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


def statistics(columns: int, tokens: int, element_size: int) -> Cost:
    """Accumulating XᵀX of ``tokens`` rows."""
    return Cost(2.0 * tokens * columns**2, element_size * tokens * columns + 8.0 * columns**2)


def factor(columns: int) -> Cost:
    """Cholesky (b³/3) and the inverse of the triangle (b³/3), in place."""
    return Cost(2 / 3 * columns**3, 4.0 * 6 * columns**2)


def energy(rows: int, columns: int) -> Cost:
    """One quadratic form (Δ H Δᵀ)_ii for every row, by half a product."""
    return Cost(1.0 * rows * columns**2, 4.0 * (2 * rows * columns + columns**2 / 2))


def solve(
    method: str, pattern: Pattern, rows: int, columns: int, block_size: int, steps: float = STEPS
) -> dict[str, Cost]:
    """Return the parts of ``prune_weight``'s work: c = ``rows``, b = ``columns``, B = ``block_size``."""
    c, b, size = float(rows), float(columns), float(min(block_size, columns))
    rest = b * (b + size) / (2 * size)  # Σ over blocks of the columns that are left
    compensating = method in ("thanos", "sparsegpt")
    forms, form = 3 if compensating else 2, energy(rows, columns)  # of the weight, of what goes, of the change
    parts = {"errors": Cost(forms * form.flops, forms * form.bytes)}
    if compensating:
        parts["factor"] = factor(columns)
    if isinstance(pattern, Columns) or not compensating:
        parts["scores"] = Cost(2 * c * b, 12 * c * b)
        return parts
    if method == "sparsegpt":
        parts["selection"] = Cost(3 * c * b, 20 * c * b)
        parts["rows"] = Cost(c * b * size, 20 * c * b)
    else:
        passes = 3 if isinstance(pattern, Unstructured) else 0  # of the histograms, over all that is left
        parts["selection"] = Cost(passes * c * rest, passes * 4 * c * rest + 8 * c * b)
        parts["rows"] = Cost(steps * 2 * c * size * b + 2 * size**2 * rest, 4 * 4 * c * b)
    parts["update"] = Cost(2 * c * size * rest, 8 * c * rest)
    return parts
