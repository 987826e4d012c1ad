"""The split of a weight's rows: rows that stay dense, and rows to prune with their pattern."""

from __future__ import annotations

import torch
from torch import Tensor

from thanos.patterns.base import Pattern
from thanos.patterns.budget import Budget


def split_rows(norms: Tensor, budget: Budget, pattern: Pattern) -> tuple[Tensor, Tensor, list[tuple[Tensor, Pattern]]]:
    """Split the rows by their squared output norms (c,).

    Returns:
        The outlier rows, which stay dense; the halved rows, which keep half of the pattern's non-zeros; and for each problem
        to solve its rows and its pattern. Rows are ascending indices.
    """
    count, half = norms.numel(), budget.halved_rows
    if half or budget.outlier_rows:
        # Adding zero turns −0 into 0. A stable sort: among equal norms the row with the lower index comes first.
        order = (norms.clamp_min(0) + 0.0).argsort(stable=True)
        sizes = [half, count - half - budget.outlier_rows, budget.outlier_rows]
        halved, others, outliers = (rows.sort().values for rows in order.split(sizes))
    else:
        halved = outliers = norms.new_empty(0, dtype=torch.int64)
        others = torch.arange(count, device=norms.device)
    parts = [(others, pattern)]
    if half:
        parts.append((halved, pattern.halved()))
    return outliers, halved, [part for part in parts if len(part[0])]
