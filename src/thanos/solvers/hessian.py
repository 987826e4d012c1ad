"""Statistics of a layer's inputs: the Hessian, damped and factorised once.

The factor is U with H⁻¹ = UᵀU. docs/math.md says why, and how U follows from a Cholesky factor of the reversed Hessian.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from thanos.errors import NumericsError
from thanos.solvers.precision import full_float32

SMALLEST_RAISED_DAMPING = 1e-6
"""Least damping after a raise, as a fraction of the mean diagonal: about ten times float32's rounding."""

RESIDUAL = 1e-2
"""Largest allowed :func:`residual`, so that losses are right to 1 %. Above it the factor is computed again in float64."""

_PANEL = 512
"""Rows or columns handled together: enough for fast products; the panel takes little memory compared with the matrix."""

_SLAB = {"cpu": 256}
_WIDE_SLAB = 2048
"""Rows of the triangle multiplied at once, by device type: few products with zeros are computed."""


@dataclass(frozen=True, slots=True)
class Factor:
    """The factor of a damped Hessian.

    Attributes:
        upper: U, (b, b), upper triangular, with H_damped⁻¹ = UᵀU. H_damped is scaled to a mean diagonal of 1.
        damping: λ, the damping that was used.
        reason: why λ differs from the requested damping; empty if it does not.
    """

    upper: Tensor
    damping: float
    reason: str


class InputStatistics:
    """The Hessian of one distinct layer input, shared by all layers and methods that read this input.

    Args:
        hessian: XᵀX up to a positive factor, (b, b), symmetric. It is not modified unless ``hand_over`` is set. None if only
            the norms are known.
        dtype: dtype of the computation, float32 or float64.
        name: name of the layer, for messages.
        squared_norms: the diagonal of XᵀX over all tokens, (b,). Pass it if ``hessian`` is None or covers only some tokens.
        hand_over: the caller no longer needs ``hessian``. If its dtype allows, it is scaled in place and becomes ``matrix``.

    Attributes:
        dtype: dtype of the computation.
        measures: whether ``matrix`` is known, so that output errors can be measured.
        norms: √H_jj of the scaled Hessian, (b,): ‖X_j‖₂ up to a common factor.
        dead: mask of the columns whose input was always zero, (b,) bool.
        dead_columns: number of these columns.
        empty: whether every column is dead: there was no input at all.

    Raises:
        NumericsError: the Hessian holds NaN or infinity, or a negative diagonal.
    """

    def __init__(
        self,
        hessian: Tensor | None,
        *,
        dtype: torch.dtype = torch.float32,
        name: str = "the layer",
        squared_norms: Tensor | None = None,
        hand_over: bool = False,
    ) -> None:
        if squared_norms is None:
            assert hessian is not None, "neither the Hessian nor the norms are given"
            squared_norms = hessian.diagonal()
        summed = squared_norms if hessian is None else hessian
        diagonal = squared_norms.to(torch.float64)
        self.dead = diagonal == 0
        scale, total, least, dead = 0.0, 0.0, 0.0, 0.0
        if diagonal.numel():  # one synchronisation with the device
            facts = diagonal.mean(), summed.sum().to(torch.float64), diagonal.min(), self.dead.sum().to(torch.float64)
            scale, total, least, dead = torch.stack(facts).tolist()
        # A finite sum proves that every entry is finite. A sum of finite entries may overflow: then look at each entry.
        if not (math.isfinite(total) or bool(torch.isfinite(summed).all())):
            raise NumericsError(
                f"the inputs of {name} hold NaN or infinity (seen in its Hessian); "
                "use another --dtype, or check whether an earlier layer overflows"
            )
        if least < 0:
            raise NumericsError(f"the Hessian of {name} has a negative diagonal entry; it must be XᵀX of the inputs")
        self.empty = scale == 0.0
        self.dtype, self.measures = dtype, hessian is not None
        self._matrix, self._scale = None, 1.0 if self.empty else scale
        if hessian is not None:
            self._matrix = _scaled(hessian, self._scale, dtype, in_place=hand_over)
        self.norms = (diagonal / (scale or 1.0)).sqrt().to(dtype)
        self.dead_columns = int(dead)
        self._factors: dict[float, Factor] = {}
        self._conditions: dict[float, float] = {}

    @property
    def matrix(self) -> Tensor:
        """The undamped Hessian divided by the mean squared norm of the columns, (b, b), in ``dtype``."""
        assert self._matrix is not None, "the Hessian was not gathered"
        return self._matrix

    def scaled(self, products: Tensor) -> Tensor:
        """Return other products with the same inputs, (any, b), in the scale and dtype of ``matrix``.

        They must have the positive factor that the Hessian was given with. ``products`` is not modified.
        """
        return _scaled(products, self._scale, self.dtype, in_place=False)

    def shift(self, damping: float) -> Tensor:
        """Return the vector that damping adds to the diagonal of ``matrix``, (b,): ``damping``, and 1 more in dead columns."""
        return self.dead.to(self.dtype) + damping

    def condition(self, damping: float, steps: int = 12) -> float:
        """Estimate the condition number of the damped Hessian by power iteration on it and on its inverse UᵀU.

        The estimate is a lower bound, up to rounding, and within a factor of about two. It is computed once for each damping.
        """
        if damping not in self._conditions:
            upper, shift = self.factor(damping).upper, self.shift(self.factor(damping).damping)[:, None]
            # A fixed start vector makes the estimate reproducible. It has no reason to be orthogonal to an eigenvector.
            order = torch.arange(1, len(upper) + 1, device=upper.device, dtype=upper.dtype)
            smallest = largest = torch.cos(order)[:, None]
            low = high = torch.ones((), device=upper.device, dtype=upper.dtype)
            with full_float32():
                for _ in range(steps):
                    smallest = upper.T @ (upper @ smallest)
                    largest = self.matrix @ largest + shift * largest
                    low, high = smallest.norm(), largest.norm()
                    smallest, largest = smallest / low, largest / high
            self._conditions[damping] = (low * high).item()  # one synchronisation
        return self._conditions[damping]

    def factor(self, damping: float) -> Factor:
        """Return the factor for this damping; it is computed once for each damping."""
        if damping not in self._factors:
            with full_float32():
                self._factors[damping] = _factorize(self.matrix, self.dead, damping)
        return self._factors[damping]


def factorize(hessian: Tensor, damping: float = 0.01) -> Factor:
    """Damp and factorise a Hessian, (b, b), that is XᵀX up to a positive factor; see :class:`Factor`."""
    dtype = torch.float64 if hessian.dtype == torch.float64 else torch.float32
    return InputStatistics(hessian, dtype=dtype).factor(damping)


def _scaled(hessian: Tensor, scale: float, dtype: torch.dtype, *, in_place: bool) -> Tensor:
    """Return hessian / scale in ``dtype``; ``in_place`` allows the function to overwrite ``hessian``."""
    # Divide float64 before the conversion, since large entries would overflow in float32. Convert other dtypes first.
    result = hessian if hessian.dtype == torch.float64 else hessian.to(dtype)
    if result is hessian and not in_place:
        result = hessian.clone()
    # A scale near the ends of float32's range has no finite reciprocal: divide by a power of two first, which is exact.
    half = 2.0 ** (math.frexp(scale)[1] // 2)
    if not 1e-30 < scale < 1e30:
        result.div_(half)
        scale /= half
    return result.div_(scale).to(dtype)


def _factorize(matrix: Tensor, dead: Tensor, damping: float) -> Factor:
    """Try the dtype of the matrix, then float64; raise the damping tenfold until a factor is good."""
    requested, tried = damping, []
    while True:
        for dtype in dict.fromkeys((matrix.dtype, torch.float64)):
            upper = _upper_inverse_factor(matrix, dead, damping, dtype)
            if upper is not None and _is_good(matrix, dead, damping, upper):
                reason = "" if not tried else f"not positive definite with damping {', '.join(f'{d:g}' for d in tried)}"
                return Factor(upper.to(matrix.dtype), damping, reason)
            del upper  # the next attempt needs its memory
        tried.append(damping)
        damping = max(damping * 10, SMALLEST_RAISED_DAMPING)
        if damping > 1e6 * max(requested, 1.0):
            raise NumericsError(f"the Hessian is not positive definite even with damping {damping:g}: it is not XᵀX")


def _is_good(matrix: Tensor, dead: Tensor, damping: float, upper: Tensor) -> bool:
    """Return whether a factor is good: finite in float64; with a residual of at most :data:`RESIDUAL` in float32.

    NaN and infinity in the factor make the residual NaN or too large, so the float32 check refuses them too.
    """
    if upper.dtype == torch.float64:
        return bool(torch.isfinite(upper.sum())) or bool(torch.isfinite(upper).all())
    return residual(matrix, dead, damping, upper) <= RESIDUAL


def _upper_inverse_factor(matrix: Tensor, dead: Tensor, damping: float, dtype: torch.dtype) -> Tensor | None:
    """Return U with (matrix + damping·I)⁻¹ = UᵀU; None if that matrix is not positive definite.

    The diagonal of dead columns is raised by 1 first. The function allocates one b × b matrix of ``dtype``, computes U in
    it, and returns U column-major.
    """
    size = matrix.shape[0]
    memory = torch.empty(size, size, dtype=dtype, device=matrix.device)
    for start in range(0, size, _PANEL):
        stop = min(start + _PANEL, size)
        memory[start:stop] = matrix[size - stop : size - start].flip(0, 1)
    memory.diagonal().add_(dead.flip(0).to(dtype)).add_(damping)
    lower = memory.mT  # symmetric, so the transpose is the same matrix; LAPACK works in place on column-major
    info = torch.zeros((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    if info.item() != 0:
        return None
    _invert_lower(lower)
    _reverse(memory)
    return lower


def _invert_lower(lower: Tensor) -> None:
    """Invert a lower triangular matrix in place, from its last block of columns to its first (docs/math.md).

    The inverse of the part further down and right is triangular too. Its rows are multiplied in slabs without the zeros on the
    right of each slab.
    """
    size, slab = lower.shape[0], _SLAB.get(lower.device.type, _WIDE_SLAB)
    identity = torch.eye(min(_PANEL, size), dtype=lower.dtype, device=lower.device)
    for start in reversed(range(0, size, _PANEL)):
        stop = min(start + _PANEL, size)
        block = lower[start:stop, start:stop]
        block.copy_(torch.linalg.solve_triangular(block, identity[: stop - start, : stop - start], upper=False))
        panel = lower[stop:, start:stop]
        below = panel @ block
        for top in range(0, size - stop, slab):
            end = min(top + slab, size - stop)
            panel[top:end] = lower[stop + top : stop + end, stop : stop + end] @ below[:end]
        panel.neg_()


def _reverse(memory: Tensor) -> None:
    """Reverse the order of rows and of columns in place: swap panels of rows from the ends inwards."""
    size = memory.shape[0]
    half = size // 2
    for start in range(0, half, _PANEL):
        stop = min(start + _PANEL, half)
        top, bottom = memory[start:stop], memory[size - stop : size - start]
        kept = top.flip(0, 1)
        top.copy_(bottom.flip(0, 1))
        bottom.copy_(kept)
    if size % 2:
        memory[half].copy_(memory[half].flip(0))


def residual(matrix: Tensor, dead: Tensor, damping: float, upper: Tensor) -> float:
    """Return how far U H Uᵀ is from the identity: the larger ‖U H Uᵀ v − v‖ / ‖v‖ of two fixed vectors v.

    H is the damped matrix. NaN counts as infinity.
    """
    size = upper.shape[0]
    angles = torch.arange(1, size + 1, device=upper.device, dtype=torch.float64)
    # Two fixed waves make the check reproducible. Their frequencies are unrelated to the order of the columns.
    probes = torch.stack([torch.cos(angles * angles), torch.sin(angles * 1.7)]).to(upper.dtype)
    worst = torch.zeros((), dtype=upper.dtype, device=upper.device)
    for probe in probes:  # one at a time: a product with a matrix of two columns is slower on the CPU
        image = upper.T @ probe
        image = matrix @ image + image * (dead.to(upper.dtype) + damping)
        worst = torch.maximum(worst, (upper @ image - probe).norm() / probe.norm())
    return worst.nan_to_num(nan=float("inf")).item()
