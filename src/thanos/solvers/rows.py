"""The rows' small systems: one symmetric positive definite matrix, a different support for every row.

For each row, x_P G_PP = w_P with x zero outside the row's support P. All rows are solved at once by conjugate gradients on
c × k matrices, the supports as a mask: A(x) = (x G) ∘ M is exactly G_PP on the support, so nothing is gathered and every
step is one c × k by k × k product. Rows that have not reached the tolerance when the steps run out, as happens with
nearly singular G, are solved directly in float64. So the result never depends on the iteration having converged.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
"""Relative residual of a row at which it counts as solved: about ten units of rounding."""

MAX_STEPS = 60
"""Well-conditioned blocks need 8 to 15 steps; past this the direct solve is the better way."""

_DIRECT_ENTRIES = 1 << 25
"""Entries of the batch of k × k matrices that the direct solve holds at once (256 MiB in float64)."""


def solve_rows(gram: Tensor, rhs: Tensor, mask: Tensor, root: Tensor | None = None) -> Tensor:
    """Solve ``x_P gram_PP = rhs_P`` for every row.

    Args:
        gram: symmetric positive definite, (k, k).
        rhs: right-hand sides, (c, k); entries outside the mask are ignored.
        mask: the supports, (c, k) bool.
        root: optional R, (k, k), with gram = RᵀR; the direct solve then forms gram in float64 from it.

    Returns:
        The solutions, (c, k), zero outside the mask.
    """
    rhs = torch.where(mask, rhs, 0.0)
    solution, residual = _conjugate_gradients(gram, rhs, mask)
    limit = TOLERANCE[gram.dtype] ** 2 * rhs.square().sum(1)
    # "not <=" rather than ">" so that a row that turned NaN is solved again too.
    failed = (~(residual.square().sum(1) <= limit)).nonzero().squeeze(1)
    if failed.numel():
        exact = gram.double() if root is None else root.double().T @ root.double()
        for rows in failed.split(max(1, _DIRECT_ENTRIES // gram.shape[0] ** 2)):
            solution[rows] = _direct(exact, rhs[rows].double(), mask[rows]).to(gram.dtype)
    return solution


def _conjugate_gradients(gram: Tensor, rhs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Run Jacobi-preconditioned conjugate gradients on all rows; return the solutions and the last residuals."""
    scale = gram.diagonal().reciprocal()
    limit = TOLERANCE[gram.dtype] ** 2 * rhs.square().sum(1)
    solution = torch.zeros_like(rhs)
    residual = rhs.clone()
    direction = residual * scale
    energy = (residual * direction).sum(1, keepdim=True)
    # Asking the device whether it is done costs a synchronisation, so a GPU is asked now and then only.
    every = 1 if rhs.device.type == "cpu" else 4
    for step in range(MAX_STEPS):
        image = torch.where(mask, direction @ gram, 0.0)
        curvature = (direction * image).sum(1, keepdim=True)
        alpha = torch.where(curvature > 0, energy / curvature, 0.0)
        solution.addcmul_(alpha, direction)
        residual.addcmul_(alpha, image, value=-1)
        if step % every == every - 1 and bool((residual.square().sum(1) <= limit).all()):
            break
        scaled = residual * scale
        following = (residual * scaled).sum(1, keepdim=True)
        direction = scaled.addcmul_(torch.where(energy > 0, following / energy, 0.0), direction)
        energy = following
    return solution, residual


def _direct(gram: Tensor, rhs: Tensor, mask: Tensor) -> Tensor:
    """Solve the rows by batched Cholesky, the unit matrix outside each support; all float64."""
    support = mask.to(gram.dtype)
    matrices = gram * (support[:, :, None] * support[:, None, :])
    matrices.diagonal(dim1=1, dim2=2).add_(1.0 - support)
    factor, info = torch.linalg.cholesky_ex(matrices)
    solution = torch.cholesky_solve(rhs[:, :, None], factor).squeeze(2)
    broken = (info != 0).nonzero().squeeze(1)
    if broken.numel():  # rounding made a nearly singular system indefinite: the least-norm solution is still exact
        solution[broken] = (torch.linalg.pinv(matrices[broken], hermitian=True) @ rhs[broken, :, None]).squeeze(2)
    return solution * support
