"""Squared output norms of weights and of their changes: what ranks rows, and what pruning cost."""

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
"""Columns of the Hessian multiplied at once: as narrow as products are fast, since half of a slab's square is
multiplied in vain; little memory beside the weight."""


def squared_output_norms(delta: Tensor, inputs: InputStatistics | None) -> Tensor:
    """Return the rows' squared output norms (Δ H Δᵀ)_ii, float64, (c,); without a Hessian their own squared norms.

    H is symmetric, so that only its lower triangle of slabs is multiplied, what lies off the diagonal counting twice.
    """
    if inputs is None or inputs.empty or not inputs.measures:
        return delta.square().sum(1, dtype=torch.float64)
    norms = torch.zeros(delta.shape[0], dtype=torch.float64, device=delta.device)
    width = _SLAB.get(delta.device.type, _WIDE_SLAB)
    for start in range(0, delta.shape[1], width):
        stop = min(start + width, delta.shape[1])
        slab = delta[:, start:stop]
        image = slab @ inputs.matrix[start:stop, start:stop]
        image.addmm_(delta[:, stop:], inputs.matrix[stop:, start:stop], alpha=2)
        norms += image.mul_(slab).sum(1)
    return norms


def relative_errors_and_zeros(
    changes: list[Tensor], total: Tensor, pruned: Tensor, inputs: InputStatistics | None
) -> tuple[list[float | None], int]:
    """Return the squared output errors of changes, relative to the weight's squared output norm, and the number of zeros.

    The device is asked once. An error is None where it is unknown: no input was seen, or outputs that were zero have changed.

    Args:
        changes: tr(Δ H Δᵀ) of each change, 0-d, on the undamped Hessian.
        total: tr(W H Wᵀ), 0-d.
        pruned: the weight as stored.
        inputs: None without a Hessian: then there is no error, and the list is empty.
    """
    others = pruned.count_nonzero().to(torch.float64)
    changed = torch.stack(changes)
    facts = torch.cat([changed / total, changed, torch.stack([total, others])]).tolist()
    fractions, norms, norm, count = facts[: len(changes)], facts[len(changes) : -2], facts[-2], facts[-1]
    zeros = pruned.numel() - int(count)
    if inputs is None or not inputs.measures:
        return [], zeros
    if inputs.empty:
        return [None] * len(changes), zeros
    if norm > 0:
        return [0.0 if -1e-6 < fraction < 0 else fraction for fraction in fractions], zeros  # rounding alone
    return [None if change > 0 else 0.0 for change in norms], zeros
