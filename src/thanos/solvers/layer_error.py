"""Squared output norms of weights and of their changes: they rank the rows and measure the error of pruning."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from thanos.solvers.hessian import InputStatistics

_PORTION = 512
"""Number of rows whose change is computed at once on the CPU. So the change stays in the cache and needs no new memory."""


def portions(rows: slice, device: torch.device) -> Iterator[slice]:
    """Yield the rows in portions; the last one takes the remainder.

    So the remainder is never a small portion of its own: products of a few rows round differently.
    """
    count = max(1, (rows.stop - rows.start) // _PORTION) if device.type == "cpu" else 1
    for i in range(count):
        start = rows.start + i * _PORTION
        yield slice(start, rows.stop if i == count - 1 else start + _PORTION)


_SLAB = {"cpu": 256}
_WIDE_SLAB = 1024
"""Columns of the Hessian multiplied at once, by device type. The least number that keeps the product fast, because half of each
slab's diagonal block is redundant work. The product takes little memory compared with the weight."""


def squared_output_norms(delta: Tensor, inputs: InputStatistics | None) -> Tensor:
    """Return the rows' squared output norms (Δ H Δᵀ)_ii, (c,) float64; without a Hessian, the rows' own squared norms.

    H is symmetric. So only the slabs of its lower triangle are multiplied, and the part off the diagonal counts twice.
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
    """Return the relative squared output error of each change, and the number of zeros, with one synchronisation.

    An error is None if it is unknown: there was no input or only zeros, or the dense outputs were zero and have changed.

    Args:
        changes: tr(Δ H Δᵀ) of each change on the undamped Hessian, 0-d tensors.
        total: tr(W H Wᵀ), the squared output norm of the weight, 0-d.
        pruned: the pruned weight in the dtype in which it is stored.
        inputs: the statistics of the inputs. Without a Hessian no error can be measured, and the list is empty.
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
        # A tiny negative value is rounding.
        return [0.0 if -1e-6 < fraction < 0 else fraction for fraction in fractions], zeros
    return [None if change > 0 else 0.0 for change in norms], zeros
