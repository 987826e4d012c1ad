"""The refit of the weights that stay, against least squares on the support."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import oracles
from thanos import prune_weight
from thanos.errors import RecipeError
from thanos.recipe.layer import LayerRecipe
from thanos.solvers.hessian import InputStatistics
from thanos.solvers.problem import Problem, Solution
from thanos.solvers.prune_layer import prune_layer
from thanos.solvers.refine.refit import refit
from thanos.solvers.support_cg import fit_support

PATTERNS = ("unstructured", "2:4", "columns")
DAMPING = 0.01


def objective(weight: Tensor, pruned: Tensor, hessian: Tensor) -> Tensor:
    """The damped squared error of each row, (c,), in float64; ``hessian`` is damped already."""
    change = pruned.double() - weight.double()
    return ((change @ hessian.double()) * change).sum(1)


@pytest.mark.parametrize("alpha", [0.0, 0.2])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", oracles.METHODS)
def test_the_weights_become_least_squares_on_the_support(method: str, pattern: str, alpha: float) -> None:
    case = oracles.layer(9, 32, seed=51)
    settings = oracles.used(method, pattern=pattern, outlier_rows=alpha, block_size=8)
    plain = prune_weight(case.weight, case.hessian, **settings)
    found = prune_weight(case.weight, case.hessian, refit=100, **settings)
    assert torch.equal(found.kept, plain.kept)
    assert found.outliers.tolist() == plain.outliers.tolist()
    assert torch.equal(found.weight[found.outliers], case.weight[found.outliers])
    best = oracles.least_squares(case.weight, found.kept, case.inputs, DAMPING)
    rows = [row for row in range(9) if row not in found.outliers.tolist()]
    assert_close(found.weight[rows], best[rows], rtol=1e-7, atol=1e-9)
    assert not found.weight[~found.kept].any()
    assert list(found.errors) == ["removed", method, "refit"]
    assert found.errors["refit"] == pytest.approx(oracles.relative_error(case.weight, found.weight, case.hessian))
    assert found.errors[method] == pytest.approx(plain.errors[method])
    assert found.residuals["refit"] < 1e-10
    assert found.damping == DAMPING


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_no_row_gets_worse_whatever_the_number_of_steps(steps: int, dtype: torch.dtype) -> None:
    for seed in range(4):
        case = oracles.layer(12, 48, seed=60 + seed, tokens=20, duplicates=[(1, 0), (30, 3)])
        hessian = oracles.damped(case.hessian, DAMPING)
        settings = LayerRecipe(method="sparsegpt", block_size=16)
        inputs = InputStatistics(case.hessian, dtype=dtype)
        plain = prune_layer(case.weight.to(dtype), inputs, settings)
        found = prune_layer(case.weight.to(dtype), inputs, LayerRecipe(method="sparsegpt", block_size=16, refit=steps))
        before, after = (objective(case.weight, result.weight, hessian) for result in (plain, found))
        rounding = 1e-6 if dtype == torch.float32 else 1e-12
        assert bool((after <= before * (1 + rounding)).all())
        assert float(after.sum()) < float(before.sum())


def problem_of(case: oracles.Layer, dtype: torch.dtype = torch.float64) -> Problem:
    inputs = InputStatistics(case.hessian, dtype=dtype)
    recipe = LayerRecipe()
    weight = case.weight.to(dtype)
    return Problem(
        weight=weight,
        zeros=weight == 0,
        inputs=inputs,
        factor=inputs.factor(DAMPING),
        pattern=recipe.parsed_pattern,
        budget=None,  # type: ignore[arg-type]  # nothing is chosen
        block_size=8,
    )


def test_a_row_that_would_get_worse_keeps_its_bits() -> None:
    case = oracles.layer(6, 24, seed=52)
    problem = problem_of(case)
    removed = torch.rand(6, 24, generator=torch.Generator().manual_seed(3)) < 0.5
    hessian = oracles.damped(case.hessian, DAMPING)
    best = oracles.best_for(case.weight, removed, hessian)
    start = torch.where(removed, 0.0, case.weight)
    start[2] = best[2]  # no step can improve this row
    found = refit(problem, Solution(start, removed), 3)
    assert bool(
        (objective(case.weight, found.weight, hessian) <= objective(case.weight, start, hessian) * (1 + 1e-14)).all()
    )
    assert_close(found.weight[2], best[2], rtol=1e-12, atol=1e-13)
    broken = fit_support(problem, start.clone().index_fill_(0, torch.tensor([4]), float("nan")), removed, 3)
    assert bool(broken.weight[4].isnan().all()), "no number was better: the row is what it was"
    assert torch.equal(broken.weight[[0, 1, 3, 5]], found.weight[[0, 1, 3, 5]])


def test_the_residual_is_that_of_the_equations() -> None:
    case = oracles.layer(5, 20, seed=53)
    problem = problem_of(case)
    removed = torch.rand(5, 20, generator=torch.Generator().manual_seed(4)) < 0.4
    found = refit(problem, Solution(torch.where(removed, 0.0, case.weight), removed), 2)
    hessian = oracles.damped(case.hessian, DAMPING)
    scale = hessian.diagonal().rsqrt()
    left = torch.where(removed, 0.0, (case.weight - found.weight) @ hessian) * scale
    right = torch.where(removed, 0.0, case.weight @ hessian) * scale
    assert found.residual is not None
    assert_close(found.residual, left.norm(dim=1) / right.norm(dim=1), rtol=1e-8, atol=1e-12)
    assert float(found.residual.max()) > 1e-4, "two steps are not enough"


def test_an_optimum_stays_and_a_row_without_weights_too() -> None:
    case = oracles.layer(4, 16, seed=54)
    found = prune_weight(case.weight, case.hessian, method="admm", refit=20)
    plain = prune_weight(case.weight, case.hessian, method="admm")
    assert_close(found.weight, plain.weight, rtol=1e-10, atol=1e-12)
    removed = torch.zeros(4, 16, dtype=torch.bool)
    removed[1] = True
    weight = case.weight.masked_fill(removed, 0.0)
    solved = refit(problem_of(case), Solution(weight, removed), 5)
    assert not solved.weight[1].any()
    assert torch.equal(solved.weight[[0, 2, 3]], weight[[0, 2, 3]])
    assert solved.residual is not None
    assert not solved.residual.any()


def test_no_refit_is_as_if_there_were_none() -> None:
    case = oracles.layer(6, 16, seed=55)
    for steps in (None, 0):
        found = prune_weight(case.weight, case.hessian, refit=steps)
        plain = prune_weight(case.weight, case.hessian)
        assert torch.equal(found.weight, plain.weight)
        assert (found.errors, found.residuals) == (plain.errors, {})


def test_a_refit_without_a_hessian_is_refused_and_without_inputs_left_out() -> None:
    weight = torch.randn(4, 8)
    with pytest.raises(RecipeError, match="refinement needs the Hessian"):
        prune_weight(weight, None, method="magnitude", refit=5)
    for method in ("magnitude", "thanos"):
        found = prune_weight(weight, torch.zeros(8, 8), method=method, refit=5)
        assert (found.method, list(found.errors), found.residuals) == ("magnitude", ["removed", "magnitude"], {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_zeros_stay_zeros_in_16_bits(dtype: torch.dtype) -> None:
    case = oracles.layer(8, 32, seed=56)
    weight = case.weight.to(dtype)
    weight[:, ::7] = 0.0
    found = prune_weight(weight, case.hessian, method="wanda", refit=10)
    assert found.weight.dtype == dtype
    assert not found.weight[~found.kept].any()
    assert not found.weight[:, ::7].any()
    assert found.errors["refit"] < found.errors["wanda"]
