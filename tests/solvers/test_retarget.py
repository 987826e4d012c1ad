"""Dense targets: the identity behind them, and what solvers make of them, in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import oracles
from thanos.recipe.layer import LayerRecipe
from thanos.solvers.hessian import InputStatistics
from thanos.solvers.problem import Problem
from thanos.solvers.prune_layer import prune_layer
from thanos.solvers.retarget import DenseTarget, dense_target

PATTERNS = ("unstructured", "2:4", "columns")
DAMPING = 0.05


@dataclass(frozen=True)
class Streams:
    """A layer with its inputs in the pruned model, (tokens, b), in the dense model, and the gap of the residual stream."""

    case: oracles.Layer
    dense: Tensor
    gap: Tensor

    @property
    def cross(self) -> Tensor:
        return self.dense.T @ self.case.inputs

    @property
    def residual(self) -> Tensor:
        return self.gap.T @ self.case.inputs

    def wanted(self, alpha: float, *, gap: bool) -> Tensor:
        """Y, (tokens, c)."""
        weight, now = self.case.weight, self.case.inputs @ self.case.weight.T
        return now + alpha * (self.dense @ weight.T + (self.gap if gap else 0.0) - now)


def streams(seed: int, rows: int = 7, columns: int = 16, **more) -> Streams:
    case = oracles.layer(rows, columns, seed=seed, **more)
    generator = torch.Generator().manual_seed(seed)
    dense = case.inputs + 0.3 * torch.randn(case.inputs.shape, generator=generator, dtype=torch.float64)
    gap = 0.5 * torch.randn(len(dense), rows, generator=generator, dtype=torch.float64)
    return Streams(case, dense, gap)


@pytest.mark.parametrize("gap", [False, True])
@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0])
def test_the_shifted_objective_differs_from_the_wanted_one_by_a_constant(alpha: float, gap: bool) -> None:
    s = streams(1, dead=[3])
    weight, hessian = s.case.weight, s.case.hessian
    inputs = InputStatistics(hessian, dtype=torch.float64)
    factor = inputs.factor(DAMPING)
    residual = inputs.scaled(s.residual) if gap else None
    shifted = dense_target(weight, inputs.matrix, inputs.scaled(s.cross), residual, factor, alpha)
    damped = oracles.damped(hessian, DAMPING)
    shift = damped.diagonal() - hessian.diagonal()
    wanted = s.wanted(alpha, gap=gap)
    constants = []
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        other = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        other[torch.rand(weight.shape, generator=generator) < 0.5] = 0.0
        direct = (wanted - s.case.inputs @ other.T).square().sum() + ((other - weight).square() * shift).sum()
        constants.append(direct - torch.trace((other - shifted) @ damped @ (other - shifted).T))
    assert_close(torch.stack(constants), constants[0].expand(5), rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("gap", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", oracles.METHODS)
def test_every_method_solves_the_shifted_weight(method: str, pattern: str, gap: bool, zeros: bool) -> None:
    s = streams(2)
    if zeros:
        if pattern == "unstructured" and method == "sparsegpt":
            pytest.skip("the oracle does not know how zeros share SparseGPT's block budget")
        s.case.weight[torch.rand(7, 16, generator=torch.Generator().manual_seed(0)) < 0.2] = 0.0
    weight, hessian, alpha = s.case.weight, s.case.hessian, 0.5
    recipe = LayerRecipe(**oracles.used(method, pattern=pattern, block_size=8, damping=DAMPING))
    level = recipe.damping
    inverse = torch.linalg.inv(oracles.damped(hessian, level))
    pull = weight @ (s.cross - hessian) + (s.residual if gap else 0.0)
    shifted = weight + alpha * pull @ inverse
    task = oracles._Task(
        shifted, hessian, oracles.damped(hessian, level), pattern, 56, 8, 8, was_zero=weight == 0
    )  # half of 7 × 16
    expected, removed = oracles.solve(method, task)
    found = prune_layer(
        weight,
        InputStatistics(hessian, dtype=torch.float64),
        recipe,
        retarget=DenseTarget(alpha, s.cross, s.residual if gap else None),
    )
    assert torch.equal(~found.kept, removed)
    assert_close(found.weight, expected, rtol=1e-8, atol=1e-9)
    assert not found.weight[weight == 0].any()

    # Both errors are what they say: against the original weight, and against the wanted output.
    wanted, norm = s.wanted(alpha, gap=gap), torch.trace(weight @ hessian @ weight.T)
    before = (wanted - s.case.inputs @ weight.T).square().sum()
    for name, pruned in (("removed", torch.where(found.kept, weight, 0.0)), (method, found.weight)):
        assert found.errors[name] == pytest.approx(oracles.relative_error(weight, pruned, hessian))
        after = (wanted - s.case.inputs @ pruned.T).square().sum()
        assert found.target_changes[name] == pytest.approx(((after - before) / norm).item(), rel=1e-6, abs=1e-10)


def test_a_refit_comes_nearer_to_the_wanted_output() -> None:
    s = streams(3, rows=12, columns=32)
    inputs = InputStatistics(s.case.hessian, dtype=torch.float64)
    recipe = LayerRecipe(method="wanda", refit=60)
    found = prune_layer(s.case.weight, inputs, recipe, retarget=DenseTarget(1.0, s.cross, s.residual))
    assert list(found.target_changes) == ["removed", "wanda", "refit"]
    assert found.target_changes["refit"] < found.target_changes["wanda"]
    # The refit of the shifted weight is the regression of the wanted output on the inputs that stay.
    wanted, level = s.wanted(1.0, gap=True), (0.01 * s.case.hessian.diagonal().mean()).sqrt()
    for row in range(12):
        kept = found.kept[row].nonzero().squeeze(1)
        pull = torch.cat([s.case.inputs, level * torch.eye(32, dtype=torch.float64)])
        target = torch.cat([wanted[:, row], level * s.case.weight[row]])
        best = torch.linalg.lstsq(pull[:, kept], target[:, None], driver="gelsd").solution[:, 0]
        assert_close(found.weight[row, kept], best, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", oracles.METHODS)
def test_an_alpha_of_zero_changes_no_bit(method: str, pattern: str) -> None:
    s = streams(4)
    recipe = LayerRecipe(**oracles.used(method, pattern=pattern, block_size=8, outlier_rows=0.2))
    for dtype in (torch.float32, torch.float64):
        weight, inputs = s.case.weight.to(dtype), InputStatistics(s.case.hessian, dtype=dtype)
        plain = prune_layer(weight, inputs, recipe)
        found = prune_layer(weight, inputs, recipe, retarget=DenseTarget(0.0, s.cross, s.residual))
        assert torch.equal(found.weight, plain.weight)
        assert torch.equal(found.kept, plain.kept)
        assert (found.errors, found.target_changes) == (plain.errors, {})


def test_an_alpha_of_zero_returns_the_very_same_problem() -> None:
    s = streams(5)
    inputs = InputStatistics(s.case.hessian, dtype=torch.float64)
    problem = Problem(
        weight=s.case.weight,
        zeros=s.case.weight == 0,
        inputs=inputs,
        factor=inputs.factor(DAMPING),
        pattern=LayerRecipe().parsed_pattern,
        budget=None,  # type: ignore[arg-type]  # nothing is chosen
        block_size=8,
    )
    assert DenseTarget(0.0, s.cross, s.residual)(problem) is problem
    shifted = DenseTarget(0.5, s.cross, s.residual)(problem)
    assert torch.equal(problem.weight, s.case.weight), "the problem was modified"
    assert shifted.all_rows is not None
    assert torch.equal(shifted.all_rows, shifted.weight)
    # The rows of a part find their own rows of R.
    rows = torch.tensor([1, 4, 6])
    part = replace(problem, weight=problem.weight[rows], zeros=problem.zeros[rows], rows=rows)
    assert_close(DenseTarget(0.5, s.cross, s.residual)(part).weight, shifted.weight[rows], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("factor", [1e-40, 1e-6, 3.0, 1e20])
def test_the_units_of_the_products_and_of_the_weight_do_not_matter(factor: float) -> None:
    s = streams(6)
    recipe = LayerRecipe(outlier_rows=0.2)
    expected = prune_layer(
        s.case.weight,
        InputStatistics(s.case.hessian, dtype=torch.float64),
        recipe,
        retarget=DenseTarget(0.5, s.cross, s.residual),
    )
    scaled = DenseTarget(0.5, s.cross * factor, s.residual * factor)
    found = prune_layer(
        s.case.weight, InputStatistics(s.case.hessian * factor, dtype=torch.float64), recipe, retarget=scaled
    )
    assert_close(found.weight, expected.weight, rtol=1e-9, atol=1e-11)
    tiny = prune_layer(
        s.case.weight * 2.0**-60,
        InputStatistics(s.case.hessian, dtype=torch.float64),
        recipe,
        retarget=DenseTarget(0.5, s.cross, s.residual * 2.0**-60),
    )
    assert_close(tiny.weight * 2.0**60, expected.weight, rtol=1e-9, atol=1e-11)
    assert tiny.target_changes["thanos"] == pytest.approx(expected.target_changes["thanos"], rel=1e-6)


def test_outlier_rows_stay_as_they_are() -> None:
    s = streams(7)
    recipe = LayerRecipe(outlier_rows=0.3)
    found = prune_layer(
        s.case.weight,
        InputStatistics(s.case.hessian, dtype=torch.float64),
        recipe,
        retarget=DenseTarget(1.0, s.cross, s.residual),
    )
    assert found.outliers.numel() == 3
    assert torch.equal(found.weight[found.outliers], s.case.weight[found.outliers])


def test_a_layer_without_inputs_has_no_target() -> None:
    weight = torch.randn(4, 8)
    target = DenseTarget(0.5, torch.zeros(8, 8))
    found = prune_layer(weight, InputStatistics(torch.zeros(8, 8)), LayerRecipe(), retarget=target)
    assert (found.method, found.target_changes) == ("magnitude", {})
