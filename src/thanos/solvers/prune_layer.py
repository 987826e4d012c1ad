"""Functions that prune one weight matrix; pure functions of tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from thanos import registry
from thanos.errors import RecipeError
from thanos.recipe.layer import DEFAULT_DAMPING, LayerRecipe
from thanos.solvers.hessian import InputStatistics
from thanos.solvers.layer_solve import LayerSolve
from thanos.solvers.precision import full_float32
from thanos.solvers.problem import Refine, Retarget
from thanos.solvers.pruned_weight import PrunedWeight as PrunedWeight
from thanos.solvers.row_shards import ALONE, RowShards


def prune_weight(
    weight: Tensor,
    hessian: Tensor | None,
    *,
    method: str = registry.DEFAULT_METHOD,
    pattern: str = registry.DEFAULT_PATTERN,
    sparsity: float | None = None,
    block_size: int | None = None,
    damping: float = DEFAULT_DAMPING,
    outlier_rows: float = 0.0,
    keep_budget: bool = False,
    scope: str | None = None,
    refit: int | None = None,
) -> PrunedWeight:
    """Prune one weight matrix. The function never modifies its inputs.

    Entries that are zero already stay zero and count towards the sparsity. If there are more of them than the sparsity
    requires, all of them stay zero. The computation is in float64 if either tensor is float64, else in float32.

    Args:
        weight: the matrix, (c, b): c output rows, b input columns; any floating dtype, any strides.
        hessian: XᵀX of the layer's inputs up to any positive factor, (b, b). None is allowed only for a
            method that needs no inputs, such as ``magnitude``. Outlier rows are then the rows of the largest norm, and no error
            is measured.
        method: name of a method in :mod:`thanos.registry`.
        pattern: text of a pattern in :mod:`thanos.registry`, such as ``unstructured``, ``columns`` or ``2:4``.
        sparsity: fraction of all c·b entries to remove, in [0, 1); default 0.5. Some patterns determine it.
        block_size: columns handled together, for methods that work block by block. It need not divide b. None: the method's
            own number for the pattern, 128 or 512.
        damping: fraction of the Hessian's mean diagonal that is added to the diagonal, at least 0. It is raised tenfold while
            the Hessian is not positive definite; the result reports this.
        outlier_rows: fraction α of rows left dense, in [0, 1): the ⌈α·c⌉ with the largest squared output norm (W H Wᵀ)_ii.
        keep_budget: remove more from the other rows to make up for the outlier rows; see
            :class:`~thanos.patterns.budget.Budget`.
        scope: ``layer``: one budget for the whole matrix; ``row``: a budget for each row, and two of them differ by at most
            one entry. None: the method's own. Only for patterns that may remove any entries.
        refit: largest number of conjugate-gradient steps that improve the remaining weights, after any method; it needs the
            Hessian. None or 0: no refit.

    Returns:
        The pruned weight, the mask, the errors, and the residual of the refit.

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
        scope=scope,
        refit=refit,
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
    row_shards: RowShards = ALONE,
    retarget: Retarget | None = None,
    refinements: Mapping[str, Refine] | None = None,
) -> PrunedWeight:
    """Prune one weight matrix. Its input statistics and their factor may be shared with other layers.

    See :func:`prune_weight` for the result and the errors raised.

    Args:
        weight: the matrix, (c, b).
        inputs: the statistics of the layer's inputs; None only for methods that need none.
        recipe: the settings of the layer.
        name: name of the weight, for messages.
        row_shards: the processes that share the work; each solves some of the rows.
        retarget: changes the problem's weight before the method runs. ``errors`` are still measured against the original
            weight, ``target_changes`` against the retarget's wanted output. Outlier rows do not change.
        refinements: the refinements by name, applied in order to the method's solution; None for those of the recipe. They and
            ``retarget`` are left out if the layer had no input, or only zeros.
    """
    with full_float32():
        refinements = _refinements(recipe) if refinements is None else refinements
        return LayerSolve(weight, inputs, recipe, name, row_shards, retarget, refinements).prune()


def _refinements(recipe: LayerRecipe) -> dict[str, Refine]:
    """Return the refinements of a recipe's repair, by name."""
    refinements: dict[str, Refine] = {}
    for row in registry.refinements():
        amount, refine = getattr(recipe.repair, row.name), row.load()
        if amount:
            refinements[row.name] = lambda problem, solution, refine=refine, amount=amount: refine(
                problem, solution, amount
            )
    return refinements
