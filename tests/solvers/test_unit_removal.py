"""Greedy removal of units: losses by brute force, downdates by fresh inverses, weights by least squares, all in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from thanos import prune_weight
from thanos.errors import RecipeError
from thanos.recipe.layer import LayerRecipe
from thanos.registry import method_names, parse_pattern
from thanos.solvers.hessian import InputStatistics
from thanos.solvers.prune_layer import prune_layer
from thanos.solvers.retarget import DenseTarget
from thanos.solvers.unit_removal import greedy_units, unit_losses, without_columns

COLUMNS = 24


def members(pattern: str) -> Tensor:
    """Columns of each unit, written out independently of the pattern: heads:G*N has G groups of N runs."""
    if pattern == "neurons":
        return torch.arange(COLUMNS)[:, None]
    groups, count = {"heads:6": (1, 6), "heads:2*3": (2, 3)}[pattern]
    run = COLUMNS // (groups * count)
    return torch.tensor([[(g * count + u) * run + i for g in range(groups) for i in range(run)] for u in range(count)])


PATTERNS = ("neurons", "heads:6", "heads:2*3")


def layer(seed: int = 0, rows: int = 10) -> tuple[Tensor, Tensor]:
    """A weight, (rows, COLUMNS), and XᵀX of correlated inputs, in float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator, dtype=torch.float64)
    inputs = torch.randn(300, COLUMNS, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(rows, COLUMNS, generator=generator, dtype=torch.float64), inputs.T @ inputs


def damped(hessian: Tensor, damping: float) -> Tensor:
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


def best(weight: Tensor, hessian: Tensor, stays: Tensor) -> tuple[Tensor, float]:
    """The weights of the least error with the columns ``stays``, by least squares on a root of the Hessian."""
    root = torch.linalg.cholesky(hessian).T  # ‖root (w − v)‖² = (w − v) H (w − v)ᵀ
    found = torch.zeros_like(weight)
    found[:, stays] = torch.linalg.lstsq(root[:, stays], root @ weight.T).solution.T
    return found, float((root @ (weight - found).T).square().sum())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_loss_of_a_unit_is_the_error_that_is_left_without_it(pattern: str) -> None:
    weight, hessian = layer()
    units = members(pattern)
    order = units.reshape(-1)
    losses = unit_losses(weight[:, order], hessian.inverse()[order][:, order], units.shape[1])
    for unit, loss in zip(units, losses, strict=True):
        stays = torch.ones(COLUMNS, dtype=torch.bool)
        stays[unit] = False
        torch.testing.assert_close(float(loss), best(weight, hessian, stays)[1], rtol=1e-9, atol=0)


def test_after_a_removal_losses_are_what_the_error_grows_by() -> None:
    weight, hessian = layer(1)
    stays = torch.ones(COLUMNS, dtype=torch.bool)
    stays[[2, 3, 11]] = False
    _, before = best(weight, hessian, stays)
    moved, inverse = without_columns(weight, hessian.inverse(), stays)
    left = stays.nonzero().squeeze(1).tolist()
    for column, loss in zip(left, unit_losses(moved, inverse, 1).tolist(), strict=True):
        fewer = stays.clone()
        fewer[column] = False
        torch.testing.assert_close(before + loss, best(weight, hessian, fewer)[1], rtol=1e-9, atol=0)


def test_a_downdate_is_the_inverse_of_what_is_left() -> None:
    weight, hessian = layer(2)
    inverse = hessian.inverse()
    stays = torch.ones(COLUMNS, dtype=torch.bool)
    for gone in ([0, 5, 7], [1], [8, 20, 21, 22]):
        local = torch.ones(int(stays.sum()), dtype=torch.bool)
        local[[int(stays[:column].sum()) for column in gone]] = False
        weight, inverse = without_columns(weight, inverse, local)
        stays[gone] = False
        torch.testing.assert_close(inverse, hessian[stays][:, stays].inverse(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(weight, best(layer(2)[0], hessian, stays)[0][:, stays], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_one_unit_at_a_time_is_the_greedy_search_by_brute_force(pattern: str) -> None:
    weight, hessian = layer(3)
    units = members(pattern)
    number = len(units) // 2
    stays, wanted = torch.ones(COLUMNS, dtype=torch.bool), []
    for _ in range(number):
        errors = {}
        for index in set(range(len(units))) - set(wanted):
            fewer = stays.clone()
            fewer[units[index]] = False
            errors[index] = best(weight, hessian, fewer)[1]
        wanted.append(min(errors, key=errors.__getitem__))
        stays[units[wanted[-1]]] = False
    found = greedy_units(weight, hessian.inverse(), units, number, steps=number)
    assert found.nonzero().squeeze(1).tolist() == sorted(wanted)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_the_weights_that_stay_are_those_of_least_squares(pattern: str, damping: float) -> None:
    weight, hessian = layer(4)
    pruned = prune_weight(weight, hessian, pattern=pattern, sparsity=1 / 3, damping=damping)
    stays = pruned.kept.any(0)
    assert int(stays.sum()) == COLUMNS * 2 // 3
    whole = members(pattern)
    assert all(bool(stays[unit].all()) or not bool(stays[unit].any()) for unit in whole)
    wanted, _ = best(weight, damped(hessian, damping), stays)
    torch.testing.assert_close(pruned.weight, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_with_a_dense_target_the_shifted_weight_is_fitted(pattern: str) -> None:
    weight, hessian = layer(5)
    generator = torch.Generator().manual_seed(6)
    cross = hessian + 20 * torch.randn(COLUMNS, COLUMNS, generator=generator, dtype=torch.float64)
    residual = 50 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    recipe = LayerRecipe(pattern=pattern, sparsity=1 / 3)
    inputs = InputStatistics(hessian, dtype=torch.float64)
    pruned = prune_layer(weight, inputs, recipe, retarget=DenseTarget(0.5, cross, residual))
    whole = damped(hessian, 0.01)
    shifted = weight + 0.5 * (weight @ (cross - hessian) + residual) @ whole.inverse()
    stays = pruned.kept.any(0)
    torch.testing.assert_close(pruned.weight, best(shifted, whole, stays)[0], rtol=1e-8, atol=1e-8)


def test_float32_chooses_units_as_good_as_float64() -> None:
    weight, hessian = layer(7)
    single = prune_weight(weight.float(), hessian.float(), pattern="neurons", sparsity=0.5)
    double = prune_weight(weight, hessian, pattern="neurons", sparsity=0.5)
    assert single.errors["thanos"] == pytest.approx(double.errors["thanos"], rel=1e-3)


def test_zeros_in_columns_that_stay_remain_zeros_and_the_others_make_up_for_them() -> None:
    weight, hessian = layer(8)
    weight[0, 3] = weight[4, 17] = weight[9, 22] = 0.0
    pruned = prune_weight(weight, hessian, pattern="neurons", sparsity=0.25)
    assert bool((pruned.weight[weight == 0] == 0).all())
    whole = damped(hessian, 0.01)
    for row, kept in enumerate(pruned.kept):
        wanted, _ = best(weight[row : row + 1], whole, kept)
        torch.testing.assert_close(pruned.weight[row : row + 1], wanted, rtol=1e-6, atol=1e-6)


def test_a_column_without_input_goes_first_whatever_its_weight() -> None:
    weight, hessian = layer(9)
    hessian[5], hessian[:, 5] = 0.0, 0.0
    weight[:, 5] = 100.0
    pruned = prune_weight(weight, hessian, pattern="neurons", sparsity=1 / COLUMNS)
    assert (~pruned.kept.any(0)).nonzero().flatten().tolist() == [5]
    assert pruned.errors["thanos"] == 0


@pytest.mark.parametrize("method", method_names())
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_method_removes_whole_units_and_the_budget(method: str, pattern: str) -> None:
    weight, hessian = layer(10)
    pruned = prune_weight(weight, hessian, method=method, pattern=pattern, sparsity=1 / 3)
    gone = ~pruned.kept.any(0)
    assert pruned.method == method
    assert int(gone.sum()) == COLUMNS // 3
    assert bool((pruned.kept == ~gone).all())
    assert bool((pruned.weight[:, gone] == 0).all())
    unit_mask = gone[members(pattern)]
    assert bool((unit_mask.all(1) == unit_mask.any(1)).all())
    removed = parse_pattern(pattern).removed_units(gone, 1 / 3)  # type: ignore[attr-defined]
    assert removed == unit_mask.all(1).nonzero().flatten().tolist()


def test_compensation_pays() -> None:
    weight, hessian = layer(11)
    errors = {
        method: prune_weight(weight, hessian, method=method, pattern="neurons", sparsity=1 / 3).error_after_compensation
        for method in ("thanos", "wanda", "magnitude")
    }
    assert errors["thanos"] is not None
    assert all(errors["thanos"] < (errors[other] or 0.0) for other in ("wanda", "magnitude"))


def test_of_more_units_without_weights_than_the_budget_the_first_are_named() -> None:
    pattern = parse_pattern("heads:6")
    gone = torch.ones(COLUMNS, dtype=torch.bool)
    gone[members("heads:6")[3]] = False
    assert pattern.removed_units(gone, 1 / 3) == [0, 1]  # type: ignore[attr-defined]


@pytest.mark.parametrize("pattern", ["heads", "heads:5", "heads:5*2"])
def test_a_matrix_that_heads_do_not_fill_is_refused(pattern: str) -> None:
    with pytest.raises(RecipeError, match="heads"):
        prune_weight(*layer(), pattern=pattern, sparsity=0.2)


@pytest.mark.parametrize("text", ["heads:0", "heads:", "heads:2*", "heads:*2", "neurons:3", "heads:-1"])
def test_other_texts_are_no_patterns_of_units(text: str) -> None:
    with pytest.raises(RecipeError, match="unknown"):
        parse_pattern(text)


def test_a_pattern_is_read_back_from_its_text() -> None:
    for text in ("neurons", "heads", "heads:9", "heads:3*4"):
        assert str(parse_pattern(text)) == text


def test_all_units_cannot_go() -> None:
    with pytest.raises(RecipeError, match="impossible"):
        prune_weight(*layer(), pattern="heads:6", sparsity=0.95)


def test_more_removed_units_mean_a_larger_error() -> None:
    weight, hessian = layer(12)
    errors = [
        prune_weight(weight, hessian, pattern="neurons", sparsity=share).errors["thanos"] or 0.0
        for share in (1 / 12, 1 / 6, 1 / 3, 2 / 3)
    ]
    assert all(lower < higher for lower, higher in pairwise(errors))
