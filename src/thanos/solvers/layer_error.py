"""Output energies of weights and of their changes: what ranks rows, and what pruning cost."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from thanos.solvers.hessian import InputStatistics

_PORTION = 512
"""Rows whose change is computed at once on the CPU, so that it stays in the cache and needs no fresh memory."""


def portions(rows: slice, device: torch.device) -> Iterator[slice]:
    """Yield the rows in portions, the last the longest: none shrinks to a few rows, for which products round otherwise."""
    count = max(1, (rows.stop - rows.start) // _PORTION) if device.type == "cpu" else 1
    for i in range(count):
        start = rows.start + i * _PORTION
        yield slice(start, rows.stop if i == count - 1 else start + _PORTION)


_SLAB = {"cpu": 256}
_WIDE_SLAB = 1024
"""Columns of the Hessian multiplied at once for an energy: as narrow as products are fast, since half of a slab's square is
multiplied in vain; little memory beside the weight."""


def row_energies(delta: Tensor, inputs: InputStatistics | None) -> Tensor:
    """Return the rows' output energies (Δ H Δᵀ)_ii, float64, (c,); without a Hessian their squared norms.

    H is symmetric, so that only its lower triangle of slabs is multiplied, what lies off the diagonal counting twice.
    """
    if inputs is None or inputs.empty or not inputs.measures:
        return delta.square().sum(1, dtype=torch.float64)
    energy = torch.zeros(delta.shape[0], dtype=torch.float64, device=delta.device)
    width = _SLAB.get(delta.device.type, _WIDE_SLAB)
    for start in range(0, delta.shape[1], width):
        stop = min(start + width, delta.shape[1])
        slab = delta[:, start:stop]
        image = slab @ inputs.matrix[start:stop, start:stop]
        image.addmm_(delta[:, stop:], inputs.matrix[stop:, start:stop], alpha=2)
        energy += image.mul_(slab).sum(1)
    return energy


def shares_and_zeros(
    changes: list[Tensor], total: Tensor, pruned: Tensor, inputs: InputStatistics | None
) -> tuple[float | None, float | None, int]:
    """Return the energies of the changes before and after compensation, 0-d, as shares of the whole, and the zeros.

    Both are measured on the undamped Hessian and the weight as stored. Where nothing compensates there is one change. The
    device is asked once.
    """
    others = pruned.count_nonzero().to(torch.float64)
    *shares, energy, count = torch.cat([torch.stack(changes) / total, torch.stack([total, others])]).tolist()
    zeros = pruned.numel() - int(count)
    if inputs is None or not inputs.measures:
        return None, None, zeros
    if inputs.empty:
        return 0.0, 0.0, zeros
    errors = [0.0 if not energy > 0 or -1e-6 < share < 0 else share for share in shares]  # rounding alone
    return errors[0], errors[-1], zeros
