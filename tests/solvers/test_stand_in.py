"""Stand-ins against float64: for every α, the best weights of one mask for the shifted target."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import oracles
from thanos.recipe.layer import LayerRecipe
from thanos.solvers.hessian import InputStatistics
from thanos.solvers.retarget import DenseTarget
from thanos.solvers.stand_in import stand_in

DAMPING = 0.01


def fitted(target: Tensor, damped: Tensor, kept: Tensor) -> Tensor:
    """The best weights of a mask, row by row: least squares in the norm of the damped Hessian."""
    found = torch.zeros_like(target)
    for row, mask in enumerate(kept):
        on = mask.nonzero().flatten()
        found[row, on] = torch.linalg.solve(damped[on][:, on], (target[row] @ damped)[on])
    return found


@pytest.mark.parametrize("unit", [1.0, 2.0**40])
@pytest.mark.parametrize(
    "changes", [{}, {"sparsity": 0.7}, {"pattern": "2:4"}, {"pattern": "columns"}, {"outlier_rows": 0.2}], ids=str
)
def test_a_stand_in_is_the_best_fit_to_the_shifted_target(changes: dict[str, Any], unit: float) -> None:
    case, generator = oracles.layer(12, 16, seed=4), torch.Generator().manual_seed(5)
    weight, inputs = case.weight * unit, case.inputs
    dense = inputs + 0.3 * torch.randn(inputs.shape, generator=generator, dtype=torch.float64)
    stream = unit * torch.randn(len(inputs), 12, generator=generator, dtype=torch.float64)
    cross, residual = dense.T @ inputs, stream.T @ inputs
    settings = LayerRecipe(damping=DAMPING, **changes)
    statistics = InputStatistics(case.hessian, dtype=torch.float64)
    found = stand_in(weight, statistics, settings, DenseTarget(1.0, cross, residual), steps=300)

    damped = case.hessian + DAMPING * case.hessian.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    shift = (weight @ (cross - case.hessian) + residual) @ torch.linalg.inv(damped)
    outliers = (found.weight != 0).all(1)
    assert outliers.sum() == (3 if "outlier_rows" in changes else 0)
    kept = found.weight != 0
    assert kept.float().mean() == pytest.approx(1 - settings.resolved_sparsity, abs=0.13)
    for alpha in (0.0, 0.25, 1.0):
        expected = fitted(weight + alpha * shift, damped, kept)
        expected[outliers] = weight[outliers]
        torch.testing.assert_close(found.at(alpha), expected, rtol=1e-6, atol=1e-6 * unit)


def test_few_steps_come_near_and_the_inputs_stay_as_they_were() -> None:
    case = oracles.layer(24, 32, seed=6)
    cross = case.hessian + 0.1 * case.hessian.roll(1, 0)
    before = case.weight.clone(), case.hessian.clone(), cross.clone()
    statistics = InputStatistics(case.hessian, dtype=torch.float64)
    near, best = (
        stand_in(case.weight, statistics, LayerRecipe(), DenseTarget(1.0, cross), steps=steps) for steps in (6, 400)
    )
    for one, other in ((near.weight, best.weight), (near.slope, best.slope)):
        assert (one - other).norm() < 0.3 * other.norm()
    assert all(map(torch.equal, before, (case.weight, case.hessian, cross)))
