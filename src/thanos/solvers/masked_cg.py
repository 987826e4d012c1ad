"""Solver of the rows' small systems: one symmetric positive definite matrix, a different support for every row.

For each row it solves x_P G_PP = w_P, with x zero outside the row's support P. Conjugate gradients solve all rows at once; a
mask holds the supports (docs/math.md). First, G and w are scaled to a unit diagonal (Jacobi's preconditioner, applied once).
So a step needs two inner products: one for its length, one for both the direction and the stopping rule.

The stopping rule has a guarantee. First, the residual of the recurrence must fall to ``TOLERANCE``. Then the true residual, w −
(x G) ∘ M, must be at most ``BACKWARD``: then x solves a nearby system. Rows that fail either check are solved directly in
float64; this happens if G is nearly singular. So the result is right whether the iteration converges or not.

On a GPU, one kernel runs the whole iteration of a block of up to 256 columns; a tile of rows stops when its rows have
converged. Wider blocks need one product and one kernel per step. The host checks once per block whether a row needs the direct
solve. With ``defer_convergence_check`` the host checks once per layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thanos.solvers.kernels import solve as kernels
from thanos.solvers.masking import only
from thanos.solvers.row_shards import ALONE, RowShards

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
"""Residual of a row's scaled system, relative to its right-hand side, at which the row is solved. In float32 this is about ten
units of rounding."""

BACKWARD = {torch.float32: 1e-5, torch.float64: 1e-11}
"""Bound of the true residual, relative to ‖w‖ + ‖G‖·‖x‖. Within it, x solves a system with G and w changed that little."""

MAX_STEPS = 60
"""Largest number of steps. Well-conditioned blocks need 8 to 15; past the limit the direct solve is better."""

_DIRECT_ENTRIES = 1 << 25
"""Entries of all k × k matrices that the direct solve holds at once (256 MiB in float64)."""

_PATIENCE = 2
"""Steps between two convergence checks on a device other than the CPU, where a check costs a round trip."""


@dataclass(slots=True)
class RowSolver:
    """A solver for one block after another; each block starts its convergence checks near the last block's step count.

    Attributes:
        steps: number of steps at which convergence is checked first, on a CPU one step earlier: that of the last block.
        direct: number of rows solved directly so far.
        row_shards: the processes that solve the other rows. All processes take the same number of steps: otherwise a row's
            last bits would depend on which rows are solved with it.
        defer_convergence_check: if one kernel runs the iteration, assume that every row converges and do not synchronise. Call
            :meth:`failed` once at the end; if it is true, solve again without this option.
    """

    steps: int = 8
    direct: int = 0
    row_shards: RowShards = ALONE
    defer_convergence_check: bool = False
    _unsolved: Tensor | None = None

    def failed(self) -> bool:
        """Return whether a row of any process did not converge in a solve with a deferred check."""
        return self._unsolved is not None and bool(self.row_shards.sum_(self._unsolved))

    def solve(self, gram: Tensor, rhs: Tensor, mask: Tensor, root: Tensor | None = None) -> Tensor:
        """Solve ``x_P gram_PP = rhs_P`` for every row; return the solutions, (c, k), zero outside the mask.

        Args:
            gram: symmetric positive definite matrix, (k, k).
            rhs: right-hand sides, (c, k); entries outside the mask are ignored.
            mask: the supports, (c, k) bool.
            root: optional R, (k, k), with gram = RᵀR, from which the direct solve forms gram in float64.
        """
        scale = gram.diagonal().rsqrt()
        scaled = (gram * scale[:, None] * scale).contiguous()
        if kernels.usable(rhs) and gram.shape[0] <= kernels.WIDEST_SYSTEM:
            limits = TOLERANCE[rhs.dtype], BACKWARD[rhs.dtype]
            solution, unsolved = kernels.conjugate_gradients(
                scaled, scale, _norm(scaled), rhs, mask, *limits, MAX_STEPS
            )
            if self.defer_convergence_check:
                count = torch.count_nonzero(unsolved)
                self._unsolved = count if self._unsolved is None else self._unsolved + count
                return solution
            failed = unsolved.nonzero().squeeze(1)
        else:
            solution, failed = self._iterate(scaled, only(rhs, mask).mul_(scale), mask)
            solution *= scale
        if failed is not None and failed.numel():
            self.direct += failed.numel()
            exact = gram.double() if root is None else root.double().T @ root.double()
            for rows in failed.split(max(1, _DIRECT_ENTRIES // max(1, gram.shape[0]) ** 2)):
                solution[rows] = _direct(exact, rhs[rows].double(), mask[rows]).to(gram.dtype)
        return solution

    def _iterate(self, gram: Tensor, rhs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the solutions of the scaled systems, and the indices of the rows that are not solved; None if all are."""
        step = (
            kernels.gradient_step if kernels.usable(rhs) and rhs.shape[1] <= kernels.WIDEST_STEP else _Step(rhs, mask)
        )
        solution, residual, direction = torch.zeros_like(rhs), rhs.clone(), rhs.clone()
        image = torch.empty_like(rhs)
        start = _squares(rhs)
        squares, limit = start.clone(), start * TOLERANCE[rhs.dtype] ** 2
        cpu = rhs.device.type == "cpu"
        patience = 1 if cpu else _PATIENCE
        first_check = min(self.steps - 1 if cpu else self.steps, MAX_STEPS)
        for count in range(1, MAX_STEPS + 1):
            torch.mm(direction, gram, out=image)
            step(direction, image, mask, solution, residual, squares)
            if count >= first_check and (count - first_check) % patience == 0:
                failed = self._failed(
                    gram, rhs, mask, solution, squares, limit, start, last=count + patience > MAX_STEPS
                )
                if failed is not None:
                    self.steps = max(2, count)
                    return solution, failed if failed.numel() else None
        raise AssertionError("the last step is always checked")

    def _failed(
        self,
        gram: Tensor,
        rhs: Tensor,
        mask: Tensor,
        x: Tensor,
        squares: Tensor,
        limit: Tensor,
        start: Tensor,
        *,
        last: bool,
    ) -> Tensor | None:
        """Return the indices of the rows that are not solved; None if more steps should be tried first."""
        # "not <=" instead of ">", so that a row with NaN counts as unsolved.
        waiting = ~(squares <= limit)
        # The true residual costs a product: the CPU checks the recurrence first; a GPU reads both in one synchronisation.
        if rhs.device.type == "cpu" and not last and bool(self.row_shards.sum_(waiting.sum())):
            return None
        true = _squares(only(x @ gram, mask).sub_(rhs))
        wrong = ~(true <= (BACKWARD[rhs.dtype] * (start.sqrt() + _norm(gram) * _squares(x).sqrt())) ** 2)
        counts = self.row_shards.sum_(torch.stack([waiting.sum(), (waiting | wrong).sum()])).tolist()
        if counts[1] == 0:
            return waiting.new_empty(0, dtype=torch.int64)
        if counts[0] and not last:
            return None
        return (waiting | wrong).nonzero().squeeze(1)


class _Step:
    """The same step as :func:`~thanos.solvers.kernels.solve.gradient_step`, in plain tensor operations."""

    def __init__(self, like: Tensor, mask: Tensor) -> None:
        self._scratch, self._support = torch.empty_like(like), mask.to(like.dtype)

    def __call__(
        self, direction: Tensor, image: Tensor, mask: Tensor, solution: Tensor, residual: Tensor, squares: Tensor
    ) -> None:
        image *= self._support
        curvature = torch.mul(direction, image, out=self._scratch).sum(1)
        alpha = torch.where(curvature > 0, squares / curvature, 0.0)[:, None]
        solution.addcmul_(alpha, direction)
        residual.addcmul_(alpha, image, value=-1)
        following = torch.mul(residual, residual, out=self._scratch).sum(1)
        beta = torch.where(squares > 0, following / squares, 0.0)[:, None]
        torch.addcmul(residual, beta, direction, out=direction)
        squares.copy_(following)


def _norm(gram: Tensor) -> Tensor:
    """Return the ∞-norm of a symmetric matrix, an upper bound of its 2-norm."""
    return gram.abs().sum(1).max()


def _squares(rows: Tensor) -> Tensor:
    return torch.linalg.vecdot(rows, rows)


def _direct(gram: Tensor, rhs: Tensor, mask: Tensor) -> Tensor:
    """Solve the rows by batched Cholesky; all tensors are float64.

    Outside each row's support its matrix is the identity, so that all matrices of the batch have the same size.
    """
    support = mask.to(gram.dtype)
    matrices = gram * (support[:, :, None] * support[:, None, :])
    matrices.diagonal(dim1=1, dim2=2).add_(1.0 - support)
    factor, info = torch.linalg.cholesky_ex(matrices)
    solution = torch.cholesky_solve(rhs[:, :, None], factor).squeeze(2)
    broken = (info != 0).nonzero().squeeze(1)
    if broken.numel():  # rounding made nearly singular systems indefinite: the least-norm solution is still exact
        solution[broken] = (torch.linalg.pinv(matrices[broken], hermitian=True) @ rhs[broken, :, None]).squeeze(2)
    return solution * support
