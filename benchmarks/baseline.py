"""A plain column-by-column pruner with SparseGPT's formulas, deliberately not optimised. It is the baseline of guard.py.

H⁻¹ = UᵀU. Columns are processed from left to right. A block's mask removes the entries with the smallest W² / diag(U)²;
an n:m group's mask is chosen at its first column. Removing W_ij changes row i by −(W_ij / U_jj) · U[j, j:].
"""

from __future__ import annotations

import torch
from torch import Tensor


def prune_column_by_column(
    weight: Tensor,
    hessian: Tensor,
    *,
    sparsity: float = 0.5,
    groups: tuple[int, int] | None = None,
    block_size: int = 128,
    damping: float = 0.01,
) -> Tensor:
    """Return the pruned weight, (c, b); ``groups`` (n, m) keeps n of every m weights instead of a fraction of the block."""
    weight, columns = weight.clone(), weight.shape[1]
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(columns, dtype=hessian.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        diagonal = upper.diagonal()[start:stop]
        block = weight[:, start:stop].clone()
        errors = torch.zeros_like(block)
        gone = torch.zeros_like(block, dtype=torch.bool)
        if groups is None:
            scores = block.square() / diagonal.square()
            chosen = scores.flatten().topk(int(sparsity * scores.numel()), largest=False).indices
            gone.view(-1)[chosen] = True
        for j in range(stop - start):
            if groups is not None and j % groups[1] == 0:
                n, m = groups
                scores = block[:, j : j + m].square() / diagonal[j : j + m].square()
                gone.scatter_(1, j + scores.topk(m - n, dim=1, largest=False).indices, value=True)
            error = torch.where(gone[:, j], block[:, j], 0.0) / diagonal[j]
            block[:, j:] -= error[:, None] * upper[start + j, start + j : stop]
            errors[:, j] = error
        weight[:, start:stop] = torch.where(gone, 0.0, block)
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return weight
