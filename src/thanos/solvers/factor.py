"""What the solvers need to know about a layer's inputs: the Hessian, damped and factorised once.

Objective of every solver: f(Ŵ) = tr((Ŵ − W) H (Ŵ − W)ᵀ), H = XᵀX. H is damped, H + λ·mean(diag H)·I, and factorised as

    H⁻¹ = Uᵀ U,  U upper triangular,

so that the inverse of every trailing matrix is at hand: (H[j:, j:])⁻¹ = U[j:, j:]ᵀ U[j:, j:]. Reversing rows and columns
turns U into the inverse of one ordinary Cholesky factor: with J the reversal and J H J = L Lᵀ, U = J L⁻¹ J. That is one
factorisation and one triangular inverse, and the inverse of H, with its squared condition, is never formed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thanos.errors import NumericsError

SMALLEST_RAISED_DAMPING = 1e-6
"""Where raising starts when less was asked for: about ten times float32's rounding, as a share of the mean diagonal."""


@dataclass(frozen=True, slots=True)
class Factor:
    """A damped Hessian's factor.

    Attributes:
        upper: U, (b, b), upper triangular, H_damped⁻¹ = UᵀU, where H_damped is scaled to a mean diagonal of 1.
        damping: λ that was used.
        reason: why λ differs from the one asked for; empty if it does not.
    """

    upper: Tensor
    damping: float
    reason: str

    def condition(self, steps: int = 12) -> float:
        """Estimate the condition number of the damped Hessian by power iteration on UᵀU and its inverse.

        An estimate within a factor of about two, from below but for rounding.
        """
        size = self.upper.shape[0]
        # A fixed start that is orthogonal to nothing in particular, so that the estimate is reproducible.
        smallest = largest = torch.cos(torch.arange(1, size + 1, device=self.upper.device, dtype=self.upper.dtype))[
            :, None
        ]
        low = high = 1.0
        for _ in range(steps):
            smallest = self.upper.T @ (self.upper @ smallest)
            largest = torch.linalg.solve_triangular(self.upper.T, largest, upper=False)
            largest = torch.linalg.solve_triangular(self.upper, largest, upper=True)
            low, high = smallest.norm().item(), largest.norm().item()
            smallest, largest = smallest / low, largest / high
        return low * high


class InputStatistics:
    """The Hessian of one distinct layer input, shared by all layers and methods that read it.

    Args:
        hessian: XᵀX up to a positive factor, (b, b), symmetric. Not modified.
        dtype: of the computation, float32 or float64.
        name: for messages.

    Attributes:
        matrix: the undamped Hessian divided by its mean diagonal, (b, b), in ``dtype``.
        norms: √H_jj of the same, (b,): ‖X_j‖₂ up to a common factor.
        dead: columns whose input was always zero, (b,) bool.
        empty: no input at all: every column is dead.

    Raises:
        NumericsError: the Hessian holds NaN or infinity, or a negative diagonal.
    """

    def __init__(self, hessian: Tensor, *, dtype: torch.dtype = torch.float32, name: str = "the layer") -> None:
        diagonal = hessian.diagonal().to(torch.float64)
        scale = diagonal.mean().item() if diagonal.numel() else 0.0
        if not _is_finite(hessian):
            raise NumericsError(
                f"the inputs of {name} hold NaN or infinity (seen in its Hessian); "
                "use another --dtype, or look for the layer before it that overflows"
            )
        if (diagonal < 0).any():
            raise NumericsError(f"the Hessian of {name} has a negative diagonal entry; it must be XᵀX of the inputs")
        self.empty = scale == 0.0
        # Dividing by a scale near the ends of float32's range may overflow on the way.
        wide = hessian.to(torch.float64) if scale and not 1e-30 < scale < 1e30 else hessian
        self.matrix = (wide / (scale or 1.0)).to(dtype)
        self.norms = (diagonal / (scale or 1.0)).sqrt().to(dtype)
        self.dead = diagonal == 0
        self._factors: dict[float, Factor] = {}

    def factor(self, damping: float) -> Factor:
        """Return the factor for this damping; computed once."""
        if damping not in self._factors:
            self._factors[damping] = _factorize(self.matrix, self.dead, damping)
        return self._factors[damping]


def factorize(hessian: Tensor, damping: float = 0.01) -> Factor:
    """Damp and factorise XᵀX, (b, b), given up to a positive factor; see :class:`Factor`."""
    dtype = torch.float64 if hessian.dtype == torch.float64 else torch.float32
    return InputStatistics(hessian, dtype=dtype).factor(damping)


def _is_finite(tensor: Tensor) -> bool:
    # The sum of finite entries may overflow, but never turns NaN or infinity into a finite number.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _factorize(matrix: Tensor, dead: Tensor, damping: float) -> Factor:
    asked, tried = damping, []
    while True:
        for dtype in dict.fromkeys((matrix.dtype, torch.float64)):
            upper = _upper_inverse_factor(matrix.to(dtype), dead, damping)
            if upper is not None:
                reason = "" if not tried else f"not positive definite with damping {', '.join(f'{d:g}' for d in tried)}"
                return Factor(upper.to(matrix.dtype), damping, reason)
        tried.append(damping)
        damping = max(damping * 10, SMALLEST_RAISED_DAMPING)
        if damping > 1e6 * max(asked, 1.0):
            raise NumericsError(f"the Hessian is not positive definite even with damping {damping:g}: it is not XᵀX")


def _upper_inverse_factor(matrix: Tensor, dead: Tensor, damping: float) -> Tensor | None:
    """Return U with (matrix + damping·I)⁻¹ = UᵀU, dead columns having 1 on the diagonal; None if not positive definite."""
    reversed_ = matrix.flip(0, 1)
    diagonal = reversed_.diagonal()
    diagonal.add_(dead.flip(0).to(matrix.dtype)).add_(damping)
    lower, info = torch.linalg.cholesky_ex(reversed_)
    if info.item() != 0:
        return None
    identity = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    upper = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
    return upper if _is_finite(upper) else None
