"""Stand-ins for the pruned weights of a layer, for every fraction α of its dense target, at a small part of a solve's cost.

The mask is that of the cheapest method that uses the inputs, |W|·‖X‖, for the layer's own weights. For a fixed mask the best
weights are linear in their target, W + α S with the shift S of :mod:`thanos.solvers.retarget`. So two fits serve every α:

    V(α) = V₀ + α D,    V₀ the fit to W, D the fit to S.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from thanos import registry
from thanos.recipe.layer import LayerRecipe
from thanos.solvers.hessian import InputStatistics
from thanos.solvers.problem import Problem, Solution
from thanos.solvers.prune_layer import prune_layer
from thanos.solvers.retarget import DenseTarget
from thanos.solvers.row_shards import ALONE, RowShards
from thanos.solvers.support_cg import fit_support

STEPS = 6
"""Largest number of steps of conjugate gradients in each fit. They give most of the gain of a converged fit, which is enough to
choose α."""


@dataclass(frozen=True, slots=True)
class StandIn:
    """The stand-ins of one weight.

    Attributes:
        weight: V₀, (c, b), in the dtype of the weight.
        slope: D, (c, b), float32 or float64; zero in outlier rows and at removed entries.
    """

    weight: Tensor
    slope: Tensor

    def at(self, alpha: float) -> Tensor:
        """Return V(α), (c, b), in the dtype of the weight."""
        return (self.weight.to(self.slope.dtype) + alpha * self.slope).to(self.weight.dtype)


def stand_in(
    weight: Tensor,
    inputs: InputStatistics,
    recipe: LayerRecipe,
    target: DenseTarget,
    *,
    name: str = "the weight",
    row_shards: RowShards = ALONE,
    steps: int = STEPS,
) -> StandIn:
    """Return the stand-ins of a weight, (c, b).

    ``inputs`` has the Hessian. The method and the repair of the ``recipe`` are not used. ``target`` has α = 1. Each fit takes
    at most ``steps`` steps of conjugate gradients. ``name`` is for messages.
    """
    slope = torch.zeros(weight.shape, dtype=inputs.dtype, device=weight.device)

    def fit(problem: Problem, solution: Solution) -> Solution:
        shift = replace(problem, weight=target(problem).weight - problem.weight)
        fitted = fit_support(shift, torch.zeros_like(problem.weight), solution.removed, steps).weight
        count = len(fitted) if problem.all_rows is None else len(problem.all_rows)
        rows = torch.arange(len(fitted), device=weight.device) if problem.rows is None else problem.rows
        slope[row_shards.gather(rows, count)] = row_shards.gather(fitted, count) * problem.unit
        return fit_support(problem, solution.weight, solution.removed, steps)

    method = registry.stand_in_method(recipe.parsed_pattern).name
    pruned = prune_layer(weight, inputs, recipe.by(method), name=name, row_shards=row_shards, refinements={"fit": fit})
    return StandIn(pruned.weight, slope)
