"""Cost models: floating-point operations and bytes of a layer's solve; docs/cost.md lists them."""

from __future__ import annotations

from thanos import registry
from thanos.patterns.base import Pattern
from thanos.solvers.cost import STEPS, Cost, Size


def statistics(columns: int, tokens: int, element_size: int) -> Cost:
    """Return the cost of XᵀX, (columns, columns) float32, for X with ``tokens`` rows and ``element_size`` bytes per entry."""
    return Cost(2.0 * tokens * columns**2, element_size * tokens * columns + 8.0 * columns**2)


def factor(columns: int) -> Cost:
    """Return the cost of the factor: Cholesky (b³/3 operations) and the inverse of the triangle (b³/3), in place."""
    return Cost(2 / 3 * columns**3, 4.0 * 6 * columns**2)


def output_norms(rows: int, columns: int) -> Cost:
    """Return the cost of (Δ H Δᵀ)_ii for every row i. Half of the product Δ H is enough, since H is symmetric."""
    return Cost(1.0 * rows * columns**2, 4.0 * (2 * rows * columns + columns**2 / 2))


def solve(
    method: str,
    pattern: Pattern,
    rows: int,
    columns: int,
    block_size: int,
    steps: float = STEPS,
    sparsity: float = 0.5,
) -> dict[str, Cost]:
    """Return the cost of each part of ``prune_weight``, by name.

    ``steps`` are iterations of the row solver. The cost of removing whole columns depends on the ``sparsity``.
    """
    row = registry.method(method)
    # Output norms: of the weight, of the removed weights and, if the method compensates, of the change.
    forms, form = 3 if row.compensates else 2, output_norms(rows, columns)
    parts = {"errors": Cost(forms * form.flops, forms * form.bytes)}
    if row.needs_factor:
        parts["factor"] = factor(columns)
    size = Size(rows, columns, min(block_size, columns), steps, sparsity)
    return parts | registry.imported(row.cost)(pattern, size)
