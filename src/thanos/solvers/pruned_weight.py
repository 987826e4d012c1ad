"""The result of pruning one weight matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

REMOVED = "removed"
"""Name of the first step in :attr:`PrunedWeight.errors`: the error before any compensation."""


@dataclass(frozen=True, slots=True)
class PrunedWeight:
    """The result for one weight matrix.

    Attributes:
        weight: the pruned weight, (c, b), in the dtype and on the device of the input weight; removed entries are exact zeros.
        zeros: number of zeros in ``weight``, by removal or by rounding.
        kept: mask of the kept entries, (c, b) bool.
        outliers: indices of the rows left dense, ascending, (q,).
        halved: indices of the rows that keep n/2 of m to make up for the outlier rows, ascending; empty without
            ``keep_budget``.
        method: name of the method that ran: the recipe's, or one that needs no inputs if the layer had no input or only zeros.
        errors: relative squared output error tr(Δ H Δᵀ) / tr(W H Wᵀ) on the undamped Hessian, by step. In the step ``removed``,
            Δ is the removed entries alone. In the steps of the method and of each refinement, by name, Δ is the whole change
            of the weight up to that step. Empty without a Hessian. None for an unknown error: no input, or only zeros.
        damping: the damping that was used, as a fraction of the Hessian's mean diagonal; None if none was used.
        damping_reason: why ``damping`` differs from the recipe's; empty if it does not.
        condition: estimated condition number of the damped Hessian; None if the Hessian was not factorised.
        residuals: the largest relative residual of a row's system of equations for the remaining weights, by step; only for
            steps that solve such systems iteratively.
        target_changes: ‖Y − X Ŵᵀ‖² − ‖Y − X Wᵀ‖² relative to ‖X Wᵀ‖², by step, if there was a retarget. X is the input, Y the
            wanted output, W the weight before pruning and Ŵ the weight after the step; there is no damping. A negative number:
            the output is nearer to the wanted one than that of the layer before pruning.
    """

    weight: Tensor
    zeros: int
    kept: Tensor
    outliers: Tensor
    halved: Tensor
    method: str
    errors: Mapping[str, float | None]
    damping: float | None
    damping_reason: str
    condition: float | None
    residuals: Mapping[str, float] = field(default_factory=dict)
    target_changes: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def error_before_compensation(self) -> float | None:
        """The error of setting the removed entries to zero without any other change; None if it is unknown, see ``errors``."""
        return self.errors.get(REMOVED)

    @property
    def error_after_compensation(self) -> float | None:
        """The error of the pruned weight after the last step; None if it is unknown, see ``errors``."""
        return list(self.errors.values())[-1] if self.errors else None

    @property
    def sparsity(self) -> float:
        """The fraction of entries removed."""
        return 1.0 - self.kept.sum().item() / max(1, self.kept.numel())
