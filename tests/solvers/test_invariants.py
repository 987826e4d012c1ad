"""What must hold for every method and pattern, whatever the numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import oracles
from thanos import prune_weight
from thanos.errors import NumericsError, RecipeError
from thanos.solvers.prune_layer import PrunedWeight

PATTERNS = ("unstructured", "2:4", "1:4", "columns")
ALPHAS = (0.0, 0.1, 0.3)
SPARSITY = 0.29  # 0.29 · 100 is 28.999999999999996 in floating point

every_cell = pytest.mark.parametrize(
    ("method", "pattern", "alpha"),
    [(m, p, a) for m in oracles.METHODS for p in PATTERNS for a in ALPHAS],
    ids=lambda value: str(value),
)
every_method_and_pattern = pytest.mark.parametrize(
    ("method", "pattern"), [(m, p) for m in oracles.METHODS for p in PATTERNS]
)


def prune(
    weight: Tensor, hessian: Tensor | None, method: str, pattern: str, alpha: float = 0.0, **more
) -> PrunedWeight:
    if ":" not in pattern:
        more.setdefault("sparsity", SPARSITY)
    return prune_weight(weight, hessian, pattern=pattern, outlier_rows=alpha, **oracles.used(method, **more))


def assert_same(actual: PrunedWeight, expected: PrunedWeight) -> None:
    assert torch.equal(actual.weight, expected.weight)
    assert torch.equal(actual.kept, expected.kept)
    assert actual.outliers.tolist() == expected.outliers.tolist()


def assert_pattern(result: PrunedWeight, pattern: str, sparsity: float, alpha: float) -> None:
    """The counts are exact, and the zeros lie as the pattern says; for a weight without zeros of its own."""
    rows, columns = result.weight.shape
    outliers = oracles.outlier_count(alpha, rows)
    assert result.outliers.numel() == outliers
    assert bool(result.kept[result.outliers].all())
    others = [i for i in range(rows) if i not in result.outliers.tolist()]
    removed = ~result.kept[others]
    if pattern == "unstructured":
        assert int(removed.sum()) == oracles.weights_to_remove(sparsity, rows, columns)
    elif pattern == "columns":
        assert int(removed.all(0).sum()) == oracles.columns_to_remove(sparsity, columns, alpha)
        assert torch.equal(removed.all(0), removed.any(0))
    else:
        n, m = (int(number) for number in pattern.split(":"))
        assert bool((removed.reshape(len(others), -1, m).sum(2) == m - n).all())
    assert not result.weight[~result.kept].any()
    assert bool((result.weight[result.kept] != 0).all())
    assert bool(torch.isfinite(result.weight).all())
    assert result.sparsity == pytest.approx(int(removed.sum()) / (rows * columns))
    assert result.zeros == int((result.weight == 0).sum())


# --- exact counts, patterns, outliers ---------------------------------------------------------------------------------


@every_cell
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counts_are_exact_and_the_pattern_holds(method, pattern, alpha, dtype):
    case = oracles.layer(10, 40, seed=1, dtype=dtype)
    weight, hessian = case.weight.clone(), case.hessian.clone()
    result = prune(case.weight, case.hessian, method, pattern, alpha, block_size=16)
    assert torch.equal(case.weight, weight), "the weight was modified"
    assert torch.equal(case.hessian, hessian), "the Hessian was modified"
    assert result.weight.dtype == dtype
    assert result.weight.shape == weight.shape
    assert result.kept.dtype == torch.bool
    assert result.weight.data_ptr() != case.weight.data_ptr()
    assert_pattern(result, pattern, SPARSITY, alpha)
    assert result.outliers.tolist() == oracles.outlier_indices(weight, hessian, alpha)
    assert torch.equal(result.weight[result.outliers], weight[result.outliers])
    if method not in oracles.COMPENSATING:
        assert torch.equal(result.weight, torch.where(result.kept, weight, 0.0))


@pytest.mark.parametrize("percent", [1, 7, 14, 28, 29, 55, 57, 58, 69, 99])
@pytest.mark.parametrize("method", oracles.METHODS)
def test_sparsity_is_exact_to_one_weight_in_awkward_percentages(method, percent):
    case = oracles.layer(10, 30, seed=2)
    result = prune(case.weight, case.hessian, method, "unstructured", sparsity=percent / 100, block_size=8)
    assert int((~result.kept).sum()) == percent * 300 // 100
    assert int((result.weight == 0).sum()) == percent * 300 // 100


@pytest.mark.parametrize("method", oracles.METHODS)
def test_the_number_of_columns_is_that_of_exact_arithmetic(method):
    case = oracles.layer(10, 70, tokens=100, seed=3)
    result = prune(case.weight, case.hessian, method, "columns", 0.3, sparsity=0.3)
    assert int((~result.kept).any(0).sum()) == 30  # 0.3 · 70 / 0.7, which floating point makes 30.000000000000004
    assert result.sparsity == pytest.approx(30 * 7 / 700)


@pytest.mark.parametrize("method", oracles.METHODS)
def test_rows_can_be_emptied_completely(method):
    case = oracles.layer(3, 12, seed=4)
    result = prune(case.weight, case.hessian, method, "unstructured", 0.6, sparsity=1 / 3, block_size=5)
    assert result.outliers.numel() == 2
    assert int((~result.kept).sum()) == 12


# --- scaling, permutation, repetition ---------------------------------------------------------------------------------


@every_cell
def test_scaling_the_hessian_changes_nothing(method, pattern, alpha):
    case = oracles.layer(8, 32, seed=5)
    expected = prune(case.weight, case.hessian, method, pattern, alpha, block_size=8)
    for factor in (2.0, 1000.0, 1 / 3, 1e-12, 1e12, 1e-40, 1e40):
        actual = prune(case.weight, case.hessian * factor, method, pattern, alpha, block_size=8)
        assert torch.equal(actual.kept, expected.kept), factor
        assert actual.outliers.tolist() == expected.outliers.tolist(), factor
        assert_close(actual.weight, expected.weight, rtol=1e-9, atol=1e-12)
        assert actual.error_before_compensation == pytest.approx(expected.error_before_compensation, rel=1e-9)
        assert actual.error_after_compensation == pytest.approx(expected.error_after_compensation, rel=1e-9)
        assert actual.damping == expected.damping


@every_method_and_pattern
@pytest.mark.parametrize("exponent", [-130, -60, 60, 110])
def test_scaling_a_float32_hessian_by_a_power_of_two_changes_nothing(method, pattern, exponent):
    case = oracles.layer(8, 32, seed=6, dtype=torch.float32)
    hessian = case.hessian * 2.0**exponent
    assert bool(torch.isfinite(hessian).all())
    assert float(hessian.diagonal().min()) > 0
    expected = prune(case.weight, case.hessian, method, pattern, 0.1, block_size=8)
    actual = prune(case.weight, hessian, method, pattern, 0.1, block_size=8)
    assert torch.equal(actual.kept, expected.kept)
    assert_close(actual.weight, expected.weight, rtol=1e-4, atol=1e-5)


@every_cell
def test_scaling_the_weight_scales_the_result(method, pattern, alpha):
    case = oracles.layer(8, 32, seed=7)
    expected = prune(case.weight, case.hessian, method, pattern, alpha, block_size=8)
    for factor in (2.0**-20, 2.0**20, 1e-6, 1e6):
        actual = prune(case.weight * factor, case.hessian, method, pattern, alpha, block_size=8)
        assert torch.equal(actual.kept, expected.kept), factor
        assert_close(actual.weight / factor, expected.weight, rtol=1e-9, atol=1e-12)


@every_cell
def test_permuting_the_rows_permutes_the_result(method, pattern, alpha):
    case = oracles.layer(9, 32, seed=8)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    expected = prune(case.weight, case.hessian, method, pattern, alpha, block_size=8)
    actual = prune(case.weight[order], case.hessian, method, pattern, alpha, block_size=8)
    assert torch.equal(actual.kept, expected.kept[order])
    assert_close(actual.weight, expected.weight[order], rtol=1e-9, atol=1e-12)
    assert sorted(order[actual.outliers].tolist()) == expected.outliers.tolist()


@every_cell
def test_the_same_call_gives_the_same_bits(method, pattern, alpha):
    case = oracles.layer(9, 32, seed=9, dtype=torch.float32)
    first = prune(case.weight, case.hessian, method, pattern, alpha, block_size=8)
    torch.rand(7)  # the state of the random generator must not matter
    assert_same(prune(case.weight, case.hessian, method, pattern, alpha, block_size=8), first)


@every_cell
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_pruning_again_changes_no_bit(method, pattern, alpha, dtype):
    case = oracles.layer(10, 40, seed=10)
    first = prune(case.weight.to(dtype), case.hessian, method, pattern, alpha, block_size=8)
    again = prune(first.weight, case.hessian, method, pattern, alpha, block_size=8)
    if again.outliers.tolist() == first.outliers.tolist():
        assert_same(again, first)
        assert again.error_after_compensation == 0.0
    else:  # the energies of pruned rows may rank differently; then other rows are the dense ones
        assert alpha > 0


@every_method_and_pattern
@pytest.mark.parametrize("block_size", [8, 64])
def test_pruning_again_with_other_methods_changes_no_bit(method, pattern, block_size):
    case = oracles.layer(8, 40, seed=11)
    if pattern == "unstructured":  # the same number in every row, so that it is Wanda's pattern too
        first = prune(case.weight, case.hessian, "wanda", pattern, sparsity=0.25)
    else:
        first = prune(case.weight, case.hessian, "thanos", pattern, sparsity=None if ":" in pattern else 0.25)
    again = prune(first.weight, case.hessian, method, pattern, sparsity=None if ":" in pattern else 0.25)
    assert_same(again, first)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("pattern", ["unstructured", "columns"])
@pytest.mark.parametrize("method", oracles.METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_sparsity_zero_is_the_identity(method, pattern, alpha, dtype):
    case = oracles.layer(6, 16, seed=12, dead=[2, 9])
    weight = case.weight.to(dtype)
    result = prune(weight, case.hessian, method, pattern, alpha, sparsity=0.0)
    assert torch.equal(result.weight, weight)
    assert bool(result.kept.all())
    assert result.sparsity == 0
    assert result.error_before_compensation == 0
    assert result.error_after_compensation == 0


# --- zeros that were there --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.2])
@pytest.mark.parametrize("block_size", [1, 8, 64])
@pytest.mark.parametrize("first_method", oracles.METHODS)
@pytest.mark.parametrize("method", oracles.METHODS)
def test_more_sparsity_is_a_superset(method, first_method, block_size, alpha):
    case = oracles.layer(10, 40, seed=13)
    first = prune(case.weight, case.hessian, first_method, "unstructured", sparsity=0.5, block_size=16)
    second = prune(first.weight, case.hessian, method, "unstructured", alpha, sparsity=0.7, block_size=block_size)
    others = [i for i in range(10) if i not in second.outliers.tolist()]
    assert not second.weight[~first.kept].any(), "a zero came back to life"
    assert not second.kept[others][~first.kept[others]].any()
    assert torch.equal(second.weight[second.outliers], first.weight[second.outliers])
    assert bool(second.kept[second.outliers].all())
    assert int((second.weight == 0).sum()) == 280, "the zeros of outlier rows, and of rows that hold more, count too"


@pytest.mark.parametrize("method", oracles.METHODS)
def test_zeros_crowded_into_one_block_do_not_break_the_count(method):
    for column in (0, 16, 32):
        case = oracles.layer(10, 40, seed=14)
        case.weight[:, column : column + 8] = 0.0
        case.weight[3, :] = 0.0
        for sparsity in (0.3, 0.5, 0.9):
            result = prune(case.weight, case.hessian, method, "unstructured", sparsity=sparsity, block_size=8)
            assert not result.weight[case.weight == 0].any()
            assert not result.kept[case.weight == 0].any()
            assert int((~result.kept).sum()) == math.floor(sparsity * 400)


@every_cell
def test_a_weight_with_more_zeros_than_asked_for_keeps_them_all(method, pattern, alpha):
    case = oracles.layer(10, 40, seed=15)
    mask = torch.rand(10, 40, generator=torch.Generator().manual_seed(1)) < 0.9
    mask[5] = True
    weight = case.weight.masked_fill(mask, 0.0)
    result = prune(weight, case.hessian, method, pattern, alpha, block_size=8)
    assert not result.weight[mask].any()
    others = [i for i in range(10) if i not in result.outliers.tolist()]
    assert not result.kept[others][mask[others]].any()
    assert torch.equal(result.weight[result.outliers], weight[result.outliers])
    if pattern == "unstructured":
        assert_close(result.weight, weight)


@pytest.mark.parametrize("method", oracles.METHODS)
def test_columns_keep_scattered_zeros(method):
    case = oracles.layer(8, 24, seed=16)
    scattered = torch.rand(8, 24, generator=torch.Generator().manual_seed(2)) < 0.3
    weight = case.weight.masked_fill(scattered, 0.0)
    result = prune(weight, case.hessian, method, "columns", sparsity=0.25)
    assert int((~result.kept).all(0).sum()) == 6
    assert not result.weight[scattered].any()
    assert not result.kept[scattered].any()
    again = prune(result.weight, case.hessian, method, "columns", sparsity=0.25)
    assert_same(again, result)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1:4"])
@pytest.mark.parametrize("method", oracles.METHODS)
def test_zeros_have_the_first_claim_before_dead_columns(method, pattern):
    # Weights of dead columns cost nothing either; were they taken first, the zeros would come on top.
    case = oracles.layer(6, 16, seed=36, dead=[0, 1, 8])
    case.weight[:, 3] = 0.0
    case.weight[:, 10] = 0.0
    result = prune(case.weight, case.hessian, method, pattern, sparsity=None if ":" in pattern else 0.25, block_size=8)
    assert not result.kept[:, [3, 10]].any()
    assert int((~result.kept).sum()) == {"unstructured": 24, "2:4": 48, "1:4": 72}[pattern]


@every_method_and_pattern
def test_a_weight_of_zeros_stays_one(method, pattern):
    hessian = oracles.layer(4, 16, seed=17).hessian
    result = prune(torch.zeros(4, 16), hessian, method, pattern, 0.25)
    assert not result.weight.any()
    assert result.error_before_compensation == 0
    assert result.error_after_compensation == 0


@every_method_and_pattern
def test_negative_zero_counts_as_zero(method, pattern):
    case = oracles.layer(4, 16, seed=18)
    positive, negative = case.weight.clone(), case.weight.clone()
    positive[:, ::5], negative[:, ::5] = 0.0, -0.0
    first, second = (prune(weight, case.hessian, method, pattern) for weight in (positive, negative))
    assert_same(second, first)


# --- hard numbers -----------------------------------------------------------------------------------------------------

HARD = {
    "one token": {"tokens": 1},
    "two tokens": {"tokens": 2},
    "dead columns": {"dead": [0, 3, 4, 31]},
    "dead columns and one token": {"tokens": 1, "dead": [0, 3, 4, 31]},
    "all but one dead": {"dead": [j for j in range(32) if j != 7]},
    "duplicates": {"duplicates": [(1, 0), (2, 0), (30, 3), (31, 3), (17, 16)]},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", [0.0, 1e-6, 0.01])
@pytest.mark.parametrize("kind", HARD)
@every_method_and_pattern
def test_hard_hessians_never_give_nan_and_keep_the_counts(method, pattern, kind, damping, dtype):
    case = oracles.layer(8, 32, seed=19, dtype=dtype, **HARD[kind])
    result = prune(case.weight, case.hessian, method, pattern, 0.125, damping=damping, block_size=8)
    assert bool(torch.isfinite(result.weight).all())
    assert math.isfinite(result.error_before_compensation)
    assert math.isfinite(result.error_after_compensation)
    removed = ~result.kept
    assert result.outliers.numel() == 1
    assert not result.weight[removed].any()
    counts = {"unstructured": 74, "2:4": 7 * 16, "1:4": 7 * 24, "columns": 7 * 11}  # ⌊.29 · 256⌋; ⌈.29 · 32 / .875⌉
    assert int(removed.sum()) == counts[pattern]
    if method in oracles.COMPENSATING:
        assert result.damping >= damping
        assert (result.damping == damping) == (result.damping_reason == "")


@every_method_and_pattern
def test_reported_errors_are_never_negative(method, pattern):
    for kind in HARD:
        case = oracles.layer(8, 32, seed=19, dtype=torch.float32, **HARD[kind])
        result = prune(case.weight, case.hessian, method, pattern, 0.125, damping=1e-6, block_size=8)
        assert result.error_before_compensation >= 0, kind
        assert result.error_after_compensation >= 0, kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", [1e-6, 1e-4, 0.01])
@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize(
    ("method", "pattern"),
    [("thanos", "unstructured"), ("thanos", "2:4"), ("thanos", "columns"), ("sparsegpt", "columns")],
)
def test_compensation_never_hurts_columns_or_a_single_block(method, pattern, kind, damping, dtype):
    case = oracles.layer(8, 32, seed=20, dtype=dtype, **HARD[kind])
    result = prune(case.weight, case.hessian, method, pattern, damping=damping, block_size=32)
    rounding = 1e-5 if dtype == torch.float32 else 1e-12
    assert result.error_after_compensation <= result.error_before_compensation * (1 + rounding) + rounding


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_thanos_in_float32_with_little_damping_is_near_the_optimum_of_its_mask(pattern, kind):
    case = oracles.layer(8, 32, seed=21, **HARD[kind])
    for damping in (1e-5, 1e-3):
        single = prune(case.weight.float(), case.hessian.float(), "thanos", pattern, damping=damping, block_size=32)
        optimum = oracles.least_squares(case.weight.float(), single.kept, case.inputs, single.damping)
        best = oracles.relative_error(case.weight, optimum, case.hessian)
        actual = oracles.relative_error(case.weight, single.weight, case.hessian)
        assert actual <= 1.01 * best + 1e-5, damping


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", oracles.COMPENSATING)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_compensation_helps_on_correlated_inputs_in_many_blocks_too(method, pattern, seed):
    case = oracles.layer(16, 48, tokens=400, seed=22 + seed)
    result = prune(case.weight, case.hessian, method, pattern, block_size=8)
    assert result.error_after_compensation < result.error_before_compensation


@pytest.mark.parametrize("kind", HARD)
@every_method_and_pattern
def test_tiny_and_huge_numbers(method, pattern, kind):
    case = oracles.layer(6, 32, seed=25, dtype=torch.float32, **HARD[kind])
    for weight_scale in (1e-6, 1e6):
        for hessian_scale in (1e-6, 1e6):
            result = prune(case.weight * weight_scale, case.hessian * hessian_scale, method, pattern, block_size=8)
            assert bool(torch.isfinite(result.weight).all())
            assert bool((result.weight[~result.kept] == 0).all())
            assert math.isfinite(result.error_after_compensation)


@pytest.mark.parametrize("method", oracles.METHODS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_columns_of_very_different_scale(method, pattern):
    case = oracles.layer(6, 32, seed=26)
    scale = torch.logspace(-4, 4, 32, dtype=torch.float64)[torch.randperm(32)]
    hessian = case.hessian * scale[:, None] * scale
    result = prune(case.weight.float(), hessian.float(), method, pattern, block_size=8)
    assert bool(torch.isfinite(result.weight).all())
    assert_pattern(result, pattern, SPARSITY, 0.0)
    assert result.error_after_compensation <= result.error_before_compensation * 1.001 + 1e-6


def test_equal_weights_and_inputs_are_still_counted_exactly():
    for method in oracles.METHODS:
        result = prune(torch.ones(5, 20), torch.eye(20), method, "unstructured", sparsity=0.5, block_size=7)
        assert int((~result.kept).sum()) == 50
        again = prune(torch.ones(5, 20), torch.ones(20, 20), method, "unstructured", sparsity=0.5, block_size=7)
        assert int((~again.kept).sum()) == 50


# --- shapes, layouts, dtypes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (8, 1), (1, 2), (2, 1), (3, 5)])
@pytest.mark.parametrize("method", oracles.METHODS)
def test_narrow_weights(method, shape):
    case = oracles.layer(*shape, seed=27)
    result = prune(case.weight, case.hessian, method, "unstructured", sparsity=0.5)
    assert int((~result.kept).sum()) == shape[0] * shape[1] // 2
    assert not result.weight[~result.kept].any()
    if shape[1] > 2:
        columns = prune(case.weight, case.hessian, method, "columns", sparsity=0.5)
        assert int((~columns.kept).all(0).sum()) == math.ceil(shape[1] / 2)


@pytest.mark.parametrize("block_size", [1, 3, 7, 31, 32, 33, 1000])
@pytest.mark.parametrize("method", oracles.METHODS)
def test_block_sizes_need_not_fit(method, block_size):
    case = oracles.layer(5, 32, seed=28)
    result = prune(case.weight, case.hessian, method, "unstructured", block_size=block_size)
    assert_pattern(result, "unstructured", SPARSITY, 0.0)
    if block_size >= 32:
        assert_same(result, prune(case.weight, case.hessian, method, "unstructured", block_size=32))
    groups = prune(case.weight, case.hessian, method, "2:4", block_size=4 * block_size)
    assert_pattern(groups, "2:4", SPARSITY, 0.0)


@every_cell
def test_strides_do_not_matter(method, pattern, alpha):
    case = oracles.layer(8, 32, seed=29)
    expected = prune(case.weight, case.hessian, method, pattern, alpha, block_size=8)
    column_major = case.weight.T.contiguous().T
    padded = torch.full((16, 64), math.nan, dtype=torch.float64)
    padded[::2, ::2] = case.weight
    hessians = torch.full((64, 96), math.nan, dtype=torch.float64)
    hessians[::2, ::3] = case.hessian
    for weight, hessian in (
        (column_major, case.hessian.T.contiguous().T),
        (padded[::2, ::2], hessians[::2, ::3]),
    ):
        assert not weight.is_contiguous()
        assert torch.equal(weight, case.weight)
        result = prune(weight, hessian, method, pattern, alpha, block_size=8)
        assert torch.equal(result.kept, expected.kept)
        assert_close(result.weight, expected.weight, rtol=1e-9, atol=1e-12)
        assert torch.equal(weight, case.weight), "the weight was modified"
        assert torch.equal(hessian, case.hessian), "the Hessian was modified"
    assert bool(padded[1::2].isnan().all())


def test_an_expanded_weight_is_not_written_through():
    row = oracles.layer(1, 8, seed=30).weight
    before = row.clone()
    result = prune(row.expand(4, 8), oracles.layer(1, 8, seed=30).hessian, "magnitude", "unstructured", sparsity=0.5)
    assert torch.equal(row, before)
    assert int((~result.kept).sum()) == 16
    assert torch.equal(result.kept, result.weight != 0)


@pytest.mark.parametrize("hessian_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_method_and_pattern
def test_half_precision_weights_keep_their_dtype(method, pattern, dtype, hessian_dtype):
    case = oracles.layer(10, 40, seed=31)
    weight = case.weight.to(dtype)
    result = prune(weight, case.hessian.to(hessian_dtype), method, pattern, 0.1, block_size=8)
    assert result.weight.dtype == dtype
    assert_pattern(result, pattern, SPARSITY, 0.1)
    assert torch.equal(result.weight[result.outliers], weight[result.outliers])
    exact = prune(weight.to(hessian_dtype), case.hessian.to(hessian_dtype), method, pattern, 0.1, block_size=8)
    assert torch.equal(result.kept, exact.kept)
    assert torch.equal(result.weight, exact.weight.to(dtype)), "computed in more precision, rounded once"


def test_half_precision_hessians_are_read_as_they_are():
    case = oracles.layer(6, 16, seed=32)
    for dtype in (torch.float16, torch.bfloat16):
        hessian = (case.hessian / case.hessian.diagonal().mean()).to(dtype)
        expected = prune(case.weight, hessian.double(), "thanos", "unstructured", damping=0.1)
        actual = prune(case.weight.float(), hessian, "thanos", "unstructured", damping=0.1)
        assert torch.equal(actual.kept, expected.kept)
        assert_close(actual.weight.double(), expected.weight, rtol=1e-3, atol=1e-4)


def test_parameters_that_need_gradients_are_served_without():
    case = oracles.layer(4, 8, seed=33)
    weight = torch.nn.Parameter(case.weight)
    for method in oracles.METHODS:
        result = prune(weight, case.hessian.clone().requires_grad_(), method, "unstructured")
        assert not result.weight.requires_grad
        assert type(result.weight) is Tensor
        assert torch.equal(weight.detach(), case.weight)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_cell
def test_the_gpu_gives_the_same(method, pattern, alpha):
    case = oracles.layer(10, 64, seed=34)
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-3)):
        weight, hessian = case.weight.to(dtype), case.hessian.to(dtype)
        expected = prune(weight, hessian, method, pattern, alpha, block_size=16)
        actual = prune(weight.cuda(), hessian.cuda(), method, pattern, alpha, block_size=16)
        assert actual.weight.is_cuda
        assert actual.weight.dtype == dtype
        assert actual.outliers.tolist() == expected.outliers.tolist()
        assert_pattern(actual, pattern, SPARSITY, alpha)
        assert torch.equal(actual.kept.cpu(), expected.kept)
        assert_close(actual.weight.cpu(), expected.weight, rtol=tolerance, atol=tolerance)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.1])
@pytest.mark.parametrize("method", oracles.METHODS)
def test_zeros_that_were_there_count_wherever_they_are(method, alpha):
    case = oracles.layer(20, 40, seed=41)
    weight = prune(case.weight, case.hessian, "thanos", "unstructured", sparsity=0.5).weight.clone()
    weight[3] = 0.0  # more than its share of any sparsity
    again = prune(weight, case.hessian, method, "unstructured", alpha, sparsity=0.7, block_size=8)
    assert int((again.weight == 0).sum()) == 560
    assert bool((again.weight[weight == 0] == 0).all())
    least = prune(weight, case.hessian, method, "unstructured", alpha, sparsity=0.1, block_size=8)
    assert torch.equal(least.weight == 0, weight == 0), (
        "more zeros than asked for: all of them stay, and no other comes"
    )


@pytest.mark.parametrize("exponent", [-100, -60, 60, 100])
@every_cell
def test_weights_of_any_size_are_pruned_alike(method, pattern, alpha, exponent):
    case = oracles.layer(10, 40, seed=43, dtype=torch.float32)
    expected = prune(case.weight, case.hessian, method, pattern, alpha, block_size=8)
    actual = prune(case.weight * 2.0**exponent, case.hessian, method, pattern, alpha, block_size=8)
    assert torch.equal(actual.kept, expected.kept)
    assert_close(actual.weight * 2.0**-exponent, expected.weight)
    assert actual.error_after_compensation == pytest.approx(expected.error_after_compensation, rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", oracles.METHODS)
def test_numbers_that_are_none_are_refused(method, bad):
    case = oracles.layer(4, 8, seed=35)
    weight, hessian = case.weight.clone(), case.hessian.clone()
    weight[2, 3] = bad
    with pytest.raises(NumericsError, match="the weight holds NaN or infinity"):
        prune(weight, case.hessian, method, "unstructured")
    hessian[1, 6] = bad
    with pytest.raises(NumericsError, match="hold NaN or infinity"):
        prune(case.weight, hessian, method, "unstructured")


@pytest.mark.parametrize("method", ["thanos", "sparsegpt", "wanda"])
def test_methods_that_need_a_hessian_say_so(method):
    with pytest.raises(RecipeError, match=f"{method} needs the Hessian"):
        prune(torch.ones(2, 4), None, method, "unstructured")


def test_shapes_that_do_not_fit_are_refused():
    weight, hessian = torch.ones(2, 4), torch.eye(4)
    for bad in (torch.ones(4), torch.ones(2, 4, 1), torch.ones(2, 4, dtype=torch.int8), torch.ones(2, 4).cfloat()):
        with pytest.raises(RecipeError, match="floating-point matrix"):
            prune_weight(bad, hessian)
    for bad in (torch.eye(3), torch.ones(4, 5), torch.ones(4), torch.eye(4).long()):
        with pytest.raises(RecipeError, match="4 × 4 floating-point matrix for a weight of shape"):
            prune_weight(weight, bad)


@pytest.mark.parametrize("method", oracles.METHODS)
def test_widths_that_the_groups_do_not_divide_are_refused(method):
    with pytest.raises(RecipeError, match=r"2:4 needs a multiple of 4 input columns.*has 10"):
        prune_weight(torch.ones(2, 10), torch.eye(10), method=method, pattern="2:4")
    with pytest.raises(RecipeError, match="block_size 10 would cut a group of pattern 2:4"):
        prune_weight(torch.ones(2, 20), torch.eye(20), method=method, pattern="2:4", block_size=10)


@pytest.mark.parametrize(
    ("shape", "arguments"),
    [
        ((10, 10), {"pattern": "columns", "sparsity": 0.95}),  # ⌈9.5⌉ = 10 of 10 columns
        ((10, 10), {"pattern": "columns", "sparsity": 0.75, "outlier_rows": 0.2}),
        ((10, 1), {"pattern": "columns", "sparsity": 0.1}),
        ((3, 100), {"sparsity": 0.34, "outlier_rows": 0.4}),  # 102 of the 100 weights in the one row that may go
        ((1, 8), {"pattern": "2:4", "outlier_rows": 0.1}),  # the only row is an outlier
        ((4, 8), {"pattern": "2:4", "outlier_rows": 0.99}),
        ((1, 8), {"sparsity": 0.1, "outlier_rows": 0.1}),
    ],
)
@pytest.mark.parametrize("method", oracles.METHODS)
def test_more_than_there_is_cannot_be_removed(method, shape, arguments):
    with pytest.raises(RecipeError, match=f"impossible for a {shape[0]} × {shape[1]} weight.*lower sparsity"):
        prune_weight(torch.ones(shape), torch.eye(shape[1]), method=method, **arguments)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"method": "obs"}, "method 'obs' is unknown; choose one of thanos, sparsegpt, wanda, magnitude"),
        ({"pattern": "rows"}, "pattern 'rows' is unknown"),
        ({"pattern": "4:2"}, "0 < n < m"),
        ({"sparsity": 1.0}, "sparsity must be a number, at least 0 and below 1"),
        ({"sparsity": -0.1}, "sparsity must be a number"),
        ({"sparsity": math.nan}, "sparsity must be a number"),
        ({"pattern": "2:4", "sparsity": 0.6}, "sparsity 0.6 contradicts pattern 2:4"),
        ({"outlier_rows": 1.0}, "outlier_rows must be a number"),
        ({"outlier_rows": 0.5, "sparsity": 0.5}, "impossible with outlier_rows 0.5"),
        ({"damping": -1.0}, "damping must be a number, at least 0"),
        ({"block_size": 0}, "block_size must be a whole number"),
    ],
)
def test_arguments_are_checked_as_those_of_a_recipe(arguments, match):
    with pytest.raises(RecipeError, match=match):
        prune_weight(torch.ones(4, 8), torch.eye(8), **arguments)
    with pytest.raises(ValueError, match=match):
        prune_weight(torch.ones(4, 8), torch.eye(8), **arguments)


@pytest.mark.parametrize("method", oracles.METHODS)
def test_a_result_from_which_nothing_went_is_a_copy(method):
    case = oracles.layer(8, 32, seed=31, dtype=torch.float32)
    result = prune_weight(case.weight, case.hessian, method=method, sparsity=0.0)
    assert torch.equal(result.weight, case.weight)
    assert result.weight.data_ptr() != case.weight.data_ptr()
