"""Pruning one weight matrix: pure functions of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from thanos.errors import NumericsError, RecipeError
from thanos.patterns.nm import NM
from thanos.patterns.parse import Pattern
from thanos.recipe import LayerRecipe
from thanos.solvers.budget import Budget
from thanos.solvers.hessian import InputStatistics
from thanos.solvers.layer_error import portions, row_energies, shares_and_zeros
from thanos.solvers.masking import without
from thanos.solvers.methods.scored import magnitude, wanda
from thanos.solvers.methods.sparsegpt import sparsegpt
from thanos.solvers.methods.thanos import thanos
from thanos.solvers.precision import full_float32
from thanos.solvers.problem import Problem
from thanos.solvers.row_shards import ALONE, Peers, share_of


@dataclass(frozen=True, slots=True)
class Method:
    """A pruning method and what it needs."""

    solve: Callable[[Problem], tuple[Tensor, Tensor]]
    needs_hessian: bool
    needs_factor: bool


METHODS = {
    "thanos": Method(thanos, True, True),
    "sparsegpt": Method(sparsegpt, True, True),
    "wanda": Method(wanda, True, False),
    "magnitude": Method(magnitude, False, False),
}


@dataclass(frozen=True, slots=True)
class PrunedWeight:
    """The result for one weight matrix.

    Attributes:
        weight: (c, b), same dtype and device as given; removed entries are exact zeros.
        zeros: how many of its entries are zero, removed or by rounding.
        kept: (c, b) bool, True where the weight stays.
        outliers: indices of the rows left dense, ascending, (q,).
        halved: indices of the rows that keep n/2 of m to make up for them, ascending; empty without ``keep_budget``.
        method: the method that ran: the one asked for, or ``magnitude`` where no input was ever seen.
        error_before_compensation: tr(Δ H Δᵀ) / tr(W H Wᵀ) with Δ the removed entries alone; None without a Hessian.
        error_after_compensation: the same with Δ the whole change of the weight; None without a Hessian.
        damping: the damping that was used, as a share of the Hessian's mean diagonal; None where none is used.
        damping_reason: why it differs from the one asked for; empty if it does not.
    """

    weight: Tensor
    zeros: int
    kept: Tensor
    outliers: Tensor
    halved: Tensor
    method: str
    error_before_compensation: float | None
    error_after_compensation: float | None
    damping: float | None
    damping_reason: str

    @property
    def sparsity(self) -> float:
        """The share of entries removed."""
        return 1.0 - self.kept.sum().item() / max(1, self.kept.numel())


def prune_weight(
    weight: Tensor,
    hessian: Tensor | None,
    *,
    method: str = "thanos",
    pattern: str = "unstructured",
    sparsity: float | None = None,
    block_size: int | None = None,
    damping: float = 0.01,
    outlier_rows: float = 0.0,
    keep_budget: bool = False,
) -> PrunedWeight:
    """Prune one weight matrix. The inputs are never modified.

    Entries that are zero already stay zero and count towards the sparsity; a weight with more zeros than asked for keeps
    them all. Computes in float64 if either tensor is float64, else in float32.

    Args:
        weight: (c, b): c output rows, b input columns; any floating dtype, any strides.
        hessian: XᵀX of the layer's inputs up to any positive factor, (b, b). Only ``magnitude`` may do without (None);
            outlier rows are then those of the largest norm, and no error is measured.
        method: ``thanos``, ``sparsegpt``, ``wanda`` or ``magnitude``.
        pattern: ``unstructured``, ``columns``, or ``N:M``: at most N non-zeros in every M consecutive inputs.
        sparsity: share of all c·b entries to remove, in [0, 1); default 0.5; follows from the pattern for n:m.
        block_size: columns handled together; default 128, or 512 for Thanos with n:m. Need not divide b.
        damping: share of the Hessian's mean diagonal added to the diagonal, at least 0. Raised tenfold, and reported,
            while the Hessian is not positive definite.
        outlier_rows: share of rows left dense, in [0, 1): the ⌈α·c⌉ with the largest output energy (W H Wᵀ)_ii.
        keep_budget: let the other rows make up for the outlier rows, see :class:`~thanos.solvers.budget.Budget`.

    Returns:
        The pruned weight, the mask and what it cost.

    Raises:
        RecipeError: an argument is out of range, or the pattern does not fit the weight.
        NumericsError: the weight or the Hessian holds NaN or infinity.
    """
    recipe = LayerRecipe(
        method=method,
        pattern=pattern,
        sparsity=sparsity,
        outlier_rows=outlier_rows,
        keep_budget=keep_budget,
        block_size=block_size,
        damping=damping,
    )
    inputs = None
    if weight.dim() != 2 or not weight.is_floating_point():
        raise RecipeError(f"weight must be a floating-point matrix; got shape {tuple(weight.shape)}, {weight.dtype}")
    if hessian is not None:
        if hessian.shape != (weight.shape[1], weight.shape[1]) or not hessian.is_floating_point():
            raise RecipeError(
                f"hessian must be a {weight.shape[1]} × {weight.shape[1]} floating-point matrix for a weight of shape "
                f"{tuple(weight.shape)}; got shape {tuple(hessian.shape)}, {hessian.dtype}"
            )
        double = torch.float64 in (weight.dtype, hessian.dtype)
        dtype = torch.float64 if double else torch.float32
        inputs = InputStatistics(hessian.to(weight.device), dtype=dtype)
    return prune_layer(weight, inputs, recipe)


@torch.no_grad()
def prune_layer(
    weight: Tensor,
    inputs: InputStatistics | None,
    recipe: LayerRecipe,
    *,
    name: str = "the weight",
    peers: Peers = ALONE,
) -> PrunedWeight:
    """Prune one weight matrix whose input statistics, and factor, may be shared with other layers.

    See :func:`prune_weight` for the arguments, the result and the errors; ``name`` is used in messages, ``peers`` are the
    processes that share the work.
    """
    with full_float32():
        return _prune_layer(weight, inputs, recipe, name, peers)


def _prune_layer(
    weight: Tensor, inputs: InputStatistics | None, recipe: LayerRecipe, name: str, peers: Peers
) -> PrunedWeight:
    method = METHODS[recipe.method]
    if inputs is None and method.needs_hessian:
        raise RecipeError(f"method {recipe.method} needs the Hessian of the layer's inputs; got None")
    budget = Budget.plan(weight.shape[0], weight.shape[1], recipe)
    dense, zeros, unit = _dense(weight, inputs, name)
    if inputs is not None and inputs.empty and method.needs_hessian:
        # No input was ever seen, so there is nothing to weigh by: reported through `method`, never silently.
        recipe, method = replace(_layer_part(recipe), method="magnitude"), METHODS["magnitude"]
    mine = slice(*_bounds(len(dense), peers))
    energy = peers.gather(row_energies(dense[mine], inputs), len(dense))
    outliers, halved, parts = _parts(energy, budget, recipe.parsed_pattern)
    if zeros and len(outliers):
        # The zeros that outlier rows hold already count too: the other rows give that much less.
        budget = replace(budget, weights=max(0, budget.weights - int((dense[outliers] == 0).sum())))
    factor = inputs.factor(recipe.damping) if inputs is not None and method.needs_factor else None

    def solve(part: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
        share = part[slice(*_bounds(len(part), peers))]
        problem = Problem(
            share, share == 0, inputs, factor, pattern, budget, recipe.resolved_block_size, peers, part, zeros == 0
        )
        solved, removed = method.solve(problem) if recipe.resolved_sparsity > 0 else (share, problem.zeros)
        mended = peers.gather((solved if unit == 1 else solved * unit).to(weight.dtype), len(part))
        # Nothing removed: the result must not be the weight that was given.
        return mended.clone() if solved is share else mended, peers.gather(~removed, len(part))

    pruned, kept = _solve_parts(weight, dense, parts, solve)

    def change(delta: Callable[[slice], Tensor]) -> Tensor:
        energies = [row_energies(delta(rows), inputs) for rows in portions(mine, dense.device)]
        return peers.gather(torch.cat(energies), len(dense)).sum()

    def written(rows: slice) -> Tensor:
        part = pruned[rows].to(dense.dtype)
        return part if unit == 1 else part / unit

    changes = [change(lambda rows: without(dense[rows], kept[rows]))]
    if method.needs_factor:
        changes.append(change(lambda rows: written(rows) - dense[rows]))
    before, after, zeros = shares_and_zeros(changes, energy.sum(), pruned, inputs)
    if after is not None and not after < float("inf"):
        raise NumericsError(f"pruning {name} gave NaN or infinity; raise damping (it is {recipe.damping:g})")
    return PrunedWeight(
        weight=pruned,
        zeros=zeros,
        kept=kept,
        outliers=outliers,
        halved=halved,
        method=recipe.method,
        error_before_compensation=before,
        error_after_compensation=after,
        damping=None if factor is None else factor.damping,
        damping_reason="" if factor is None else factor.reason,
    )


def _dense(weight: Tensor, inputs: InputStatistics | None, name: str) -> tuple[Tensor, int, float]:
    """Return the weight divided by a power of two, in the dtype of the work, its zeros, and that power, mostly 1.

    Raises:
        NumericsError: it holds NaN or infinity.
    """
    dtype = inputs.dtype if inputs is not None else _compute_dtype(weight)
    dense = weight.detach().to(dtype).contiguous()  # the kernels take rows that are one stretch of memory
    largest, zeros = _survey(dense)
    if not math.isfinite(largest):
        raise NumericsError(f"{name} holds NaN or infinity; the checkpoint is damaged, or its dtype overflowed")
    unit = _unit(largest)
    if unit != 1:
        dense = dense / unit
        zeros = _survey(dense)[1]  # small ones may have become zeros
    return dense, zeros, unit


def _solve_parts(
    weight: Tensor,
    dense: Tensor,
    parts: list[tuple[Tensor, Pattern]],
    solve: Callable[[Tensor, Pattern], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Return the pruned weight, (c, b), and what is kept of it; rows in none of the parts stay as they are.

    One part of all rows is the result as it was solved, and nothing is copied.
    """
    if len(parts) == 1 and len(parts[0][0]) == len(dense):
        return solve(dense, parts[0][1])
    pruned = weight.detach().clone()
    kept = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
    for rows, pattern in parts:
        pruned[rows], kept[rows] = solve(dense[rows], pattern)
    return pruned, kept


def _layer_part(recipe: LayerRecipe) -> LayerRecipe:
    return LayerRecipe(**{f.name: getattr(recipe, f.name) for f in fields(LayerRecipe)})


def _compute_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


_ORDINARY = 2.0**40
"""Weights up to here, and down to its reciprocal, are squared and added up in float32 without overflow or underflow."""


def _survey(dense: Tensor) -> tuple[float, int]:
    """Return the largest absolute entry, NaN if any entry is, and how many are zero; the device is asked once."""
    if not dense.numel():
        return 0.0, 0
    facts = *dense.aminmax(), dense.count_nonzero()
    least, most, others = torch.stack([fact.to(torch.float64) for fact in facts]).tolist()
    return max(-least, most), dense.numel() - int(others)


def _unit(largest: float) -> float:
    """Return the power of two by which weights of extraordinary size are divided while they are pruned; 1 for others."""
    return 1.0 if largest == 0 or 1 / _ORDINARY < largest < _ORDINARY else 2.0 ** (math.frexp(largest)[1] - 1)


def _parts(energy: Tensor, budget: Budget, pattern: Pattern) -> tuple[Tensor, Tensor, list[tuple[Tensor, Pattern]]]:
    """Split the rows by their output energies (c,): which stay dense, which are halved, and what is solved by which pattern.

    n:m treats every row by itself, so that rows of another n are a problem of their own.
    """
    count, half = energy.numel(), budget.halved_rows
    if half or budget.outlier_rows:
        # Adding zero makes −0 to 0. Among equals the first goes first.
        order = (energy.clamp_min(0) + 0.0).argsort(stable=True)
        sizes = [half, count - half - budget.outlier_rows, budget.outlier_rows]
        halved, others, outliers = (rows.sort().values for rows in order.split(sizes))
    else:
        halved = outliers = energy.new_empty(0, dtype=torch.int64)
        others = torch.arange(count, device=energy.device)
    parts = [(others, pattern)]
    if half and isinstance(pattern, NM):
        parts.append((halved, NM(pattern.n // 2, pattern.m)))
    return outliers, halved, [part for part in parts if len(part[0])]


def _bounds(count: int, peers: Peers) -> tuple[int, int]:
    share = share_of(count, peers.rank, peers.size)
    return share.start, share.stop
