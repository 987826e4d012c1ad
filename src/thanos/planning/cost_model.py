"""Cost models: floating-point operations and bytes of a layer's solve, as docs/cost.md derives them."""

from __future__ import annotations

from thanos import registry
from thanos.patterns.base import Pattern
from thanos.solvers.cost import STEPS, Cost, Size


def statistics(columns: int, tokens: int, element_size: int) -> Cost:
    """Accumulating XᵀX of ``tokens`` rows."""
    return Cost(2.0 * tokens * columns**2, element_size * tokens * columns + 8.0 * columns**2)


def factor(columns: int) -> Cost:
    """Cholesky (b³/3) and the inverse of the triangle (b³/3), in place."""
    return Cost(2 / 3 * columns**3, 4.0 * 6 * columns**2)


def output_norms(rows: int, columns: int) -> Cost:
    """One quadratic form (Δ H Δᵀ)_ii for every row, by half a product."""
    return Cost(1.0 * rows * columns**2, 4.0 * (2 * rows * columns + columns**2 / 2))


def solve(
    method: str, pattern: Pattern, rows: int, columns: int, block_size: int, steps: float = STEPS
) -> dict[str, Cost]:
    """Return the parts of ``prune_weight``'s work: c = ``rows``, b = ``columns``, B = ``block_size``."""
    row = registry.method(method)
    forms, form = 3 if row.compensates else 2, output_norms(rows, columns)  # of the weight, of what goes, of the change
    parts = {"errors": Cost(forms * form.flops, forms * form.bytes)}
    if row.needs_factor:
        parts["factor"] = factor(columns)
    size = Size(rows, columns, min(block_size, columns), steps)
    return parts | registry.imported(row.cost)(pattern, size)
