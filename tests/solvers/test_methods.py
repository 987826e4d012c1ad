"""Every method and pattern against the slow float64 implementations in ``oracles``."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import oracles
from thanos import prune_weight
from thanos.solvers import masked_cg as rows

PATTERNS = ("unstructured", "2:4", "1:4", "5:8", "columns")


def check(case: oracles.Layer, **arguments) -> None:
    """The result is the oracle's: rows, mask, weights and both errors."""
    weight, hessian = case.weight, case.hessian
    expected, kept, outliers = oracles.prune(weight, hessian, **arguments)
    if ":" in arguments.get("pattern", ""):
        arguments = {k: v for k, v in arguments.items() if k != "sparsity"}
    result = prune_weight(weight, hessian, **oracles.used(**arguments))
    assert result.method == arguments["method"]
    assert result.outliers.dtype == torch.int64
    assert result.outliers.tolist() == outliers
    assert torch.equal(result.kept, kept)
    assert (result.weight - expected).norm() <= 1e-8 * weight.norm()
    after = oracles.relative_error(weight, expected, hessian)
    before = oracles.relative_error(weight, torch.where(kept, weight, 0.0), hessian)
    assert isinstance(result.error_before_compensation, float)
    assert isinstance(result.error_after_compensation, float)
    assert result.error_before_compensation == pytest.approx(before, rel=1e-6, abs=1e-12)
    assert result.error_after_compensation == pytest.approx(after, rel=1e-6, abs=1e-12)
    assert result.sparsity == pytest.approx(1 - kept.double().mean().item())
    if arguments["method"] in oracles.COMPENSATING:
        assert result.damping == arguments.get("damping", 0.01)
    else:
        assert result.damping is None
        assert result.error_after_compensation == result.error_before_compensation
    assert result.damping_reason == ""


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("block_size", [8, 40, 128])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", oracles.METHODS)
def test_method_and_pattern_match_the_oracle(method, pattern, block_size, alpha):
    case = oracles.layer(7, 24, seed=11)
    check(case, method=method, pattern=pattern, block_size=block_size, outlier_rows=alpha)


@pytest.mark.parametrize("sparsity", [0.1, 0.29, 0.7, 0.95])
@pytest.mark.parametrize("block_size", [1, 7])
@pytest.mark.parametrize("method", oracles.METHODS)
def test_unstructured_matches_the_oracle_at_other_sparsities_and_block_sizes(method, sparsity, block_size):
    check(oracles.layer(6, 23, seed=12), method=method, sparsity=sparsity, block_size=block_size)


@pytest.mark.parametrize("sparsity", [0.01, 0.29, 0.6])
@pytest.mark.parametrize("method", oracles.METHODS)
def test_columns_match_the_oracle_at_other_sparsities(method, sparsity):
    check(oracles.layer(6, 23, seed=13), method=method, pattern="columns", sparsity=sparsity, outlier_rows=0.2)


@pytest.mark.parametrize("damping", [1e-3, 0.1, 2.0])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", oracles.COMPENSATING)
def test_damping_and_few_tokens_match_the_oracle(method, pattern, damping):
    check(oracles.layer(5, 16, tokens=6, seed=14), method=method, pattern=pattern, block_size=8, damping=damping)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", oracles.METHODS)
def test_dead_columns_match_the_oracle(method, pattern):
    case = oracles.layer(5, 16, seed=15, dead=[0, 5, 6, 15])
    check(case, method=method, pattern=pattern, block_size=8, outlier_rows=0.2, sparsity=0.4)


@pytest.mark.parametrize("method", oracles.METHODS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_zeros_that_were_there_match_the_oracle(method, pattern):
    case = oracles.layer(6, 16, seed=16)
    case.weight[torch.rand(6, 16, generator=torch.Generator().manual_seed(0)) < 0.2] = 0.0
    if method == "sparsegpt" and pattern == "unstructured":
        pytest.skip("how zeros share SparseGPT's block budget is tested by its counts")
    check(case, method=method, pattern=pattern, block_size=8, outlier_rows=0.1)


def test_a_row_of_zeros_lets_the_other_rows_of_wanda_give_less():
    case = oracles.layer(6, 16, seed=17)
    case.weight[2] = 0.0
    check(case, method="wanda", pattern="unstructured", sparsity=0.5)
    kept = prune_weight(case.weight, case.hessian, method="wanda", sparsity=0.5).kept.sum(1)
    assert kept[2] == 0
    assert sorted(kept.tolist()) == [0, 9, 9, 10, 10, 10], "48 of 96 stay, shared by five rows"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    method=st.sampled_from(oracles.METHODS),
    pattern=st.sampled_from(("unstructured", "columns", "1:2", "2:3", "2:4", "3:5")),
    rows=st.integers(1, 7),
    columns=st.integers(2, 20),
    tokens=st.integers(1, 60),
    sparsity=st.integers(0, 99).map(lambda percent: percent / 100),
    alpha=st.sampled_from([0.0, 0.07, 0.2, 0.5]),
    block_size=st.integers(1, 24),
    damping=st.sampled_from([0.001, 0.01, 0.5]),
    seed=st.integers(0, 1000),
)
def test_anything_matches_the_oracle(
    method, pattern, rows, columns, tokens, sparsity, alpha, block_size, damping, seed
):
    if ":" in pattern:
        m = int(pattern.split(":")[1])
        columns, block_size = max(m, columns // m * m), max(m, block_size // m * m)
    outliers = oracles.outlier_count(alpha, rows)
    assume(outliers < rows)
    if pattern == "columns":
        assume(sparsity < 1 - alpha and oracles.columns_to_remove(sparsity, columns, alpha) < columns)
    elif pattern == "unstructured":
        assume(sparsity < 1 - alpha)
        assume(oracles.weights_to_remove(sparsity, rows, columns) <= (rows - outliers) * columns)
    check(
        oracles.layer(rows, columns, tokens=tokens, seed=seed),
        method=method,
        pattern=pattern,
        sparsity=sparsity,
        outlier_rows=alpha,
        block_size=block_size,
        damping=damping,
    )


# --- what the definitions promise, by hand ----------------------------------------------------------------------------


def test_magnitude_by_hand():
    weight = torch.tensor([[1.0, -4.0, 0.5, 3.0], [-0.25, 2.0, 5.0, -6.0]])
    result = prune_weight(weight, None, method="magnitude", sparsity=0.5)
    assert result.weight.tolist() == [[0, -4.0, 0, 3.0], [0, 0, 5.0, -6.0]]
    assert result.error_before_compensation is None
    assert result.error_after_compensation is None
    assert result.damping is None
    columns = prune_weight(weight, None, method="magnitude", pattern="columns", sparsity=0.5)
    assert columns.weight.tolist() == [[0, -4.0, 0, 3.0], [0, 2.0, 0, -6.0]]  # sums 1.25, 6, 5.5, 9
    two = prune_weight(weight, None, method="magnitude", pattern="1:2")
    assert two.weight.tolist() == [[0, -4.0, 0, 3.0], [0, 2.0, 0, -6.0]]


def test_magnitude_ignores_the_hessian_but_measures_by_it():
    case = oracles.layer(5, 12, seed=17)
    for pattern in PATTERNS[:3]:
        with_hessian = prune_weight(case.weight, case.hessian, method="magnitude", pattern=pattern)
        without = prune_weight(case.weight, None, method="magnitude", pattern=pattern)
        assert torch.equal(with_hessian.weight, without.weight)
        assert with_hessian.error_before_compensation == pytest.approx(
            oracles.relative_error(case.weight, without.weight, case.hessian)
        )


def test_magnitude_without_a_hessian_keeps_the_rows_of_the_largest_norm():
    weight = torch.tensor([[1.0, 1.0], [3.0, 3.0], [2.0, -2.0], [0.5, 0.5]])
    result = prune_weight(weight, None, method="magnitude", sparsity=0.25, outlier_rows=0.5)
    assert result.outliers.tolist() == [1, 2]
    assert result.weight.tolist() == [[1.0, 1.0], [3.0, 3.0], [2.0, -2.0], [0, 0]]


def test_wanda_by_hand():
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]])
    hessian = torch.diag(torch.tensor([16.0, 1.0, 1.0, 4.0]))  # norms 4, 1, 1, 2
    result = prune_weight(weight, hessian, method="wanda")
    assert result.weight.tolist() == [[1.0, 0, 0, 4.0], [4.0, 3.0, 0, 0]]  # scores 4 2 3 8 and 16 3 2 2


def test_wanda_gives_every_row_the_same_number_up_to_one_and_the_layer_its_total():
    case = oracles.layer(8, 15, seed=18)
    result = prune_weight(case.weight, case.hessian, method="wanda", sparsity=0.37)  # 44.4 of 120: 5.5 a row
    zeros = (~result.kept).sum(1)
    assert int(zeros.sum()) == 44
    assert set(zeros.tolist()) == {5, 6}


def test_thanos_by_hand_on_one_removed_weight():
    weight = torch.tensor([[1.0, 10.0]], dtype=torch.float64)
    hessian = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    result = prune_weight(weight, hessian, damping=0.0)
    assert result.weight.tolist() == [[0.0, pytest.approx(10.5)]]  # H_PK / H_KK = 1/2 of the removed weight moves over
    assert result.error_before_compensation == pytest.approx(2 / 222)
    assert result.error_after_compensation == pytest.approx(1.5 / 222)


def test_thanos_rows_may_differ_in_sparsity_and_the_budget_moves_between_blocks():
    weight = 1.0 + oracles.layer(4, 16, seed=19).weight.abs()
    weight[:, :8] *= 100  # all the small weights lie in the second block
    result = prune_weight(weight, torch.eye(16, dtype=torch.float64), block_size=8)
    assert bool(result.kept[:, :8].all())
    assert not bool(result.kept[:, 8:].any())
    weight = 1.0 + oracles.layer(4, 16, seed=19).weight.abs()
    weight[1:] *= 100
    result = prune_weight(weight, torch.eye(16, dtype=torch.float64), block_size=8, sparsity=0.25)
    assert (~result.kept).sum(1).tolist() == [16, 0, 0, 0]


def test_sparsegpt_spreads_its_zeros_evenly_over_the_blocks():
    case = oracles.layer(3, 20, seed=20)
    weight = case.weight.clone()
    weight[:, :8] *= 100  # changes nothing: each block has its share
    result = prune_weight(weight, case.hessian, method="sparsegpt", block_size=8, sparsity=0.37)  # 22.2 of 60
    zeros = [int((~result.kept[:, j : j + 8]).sum()) for j in (0, 8, 16)]
    assert zeros == [8, 9, 5]  # ⌊22·8/20⌋ = 8, ⌊22·16/20⌋ = 17, 22


@pytest.mark.parametrize("method", oracles.BLOCKWISE)
def test_default_block_size_is_the_papers(method):
    case = oracles.layer(2, 260, seed=21)
    default = prune_weight(case.weight, case.hessian, method=method)
    assert torch.equal(default.weight, prune_weight(case.weight, case.hessian, method=method, block_size=128).weight)
    nm = prune_weight(case.weight, case.hessian, method=method, pattern="2:4")
    block_size = 512 if method == "thanos" else 128
    explicit = prune_weight(case.weight, case.hessian, method=method, pattern="2:4", block_size=block_size)
    assert torch.equal(nm.weight, explicit.weight)


@pytest.mark.parametrize("method", oracles.METHODS)
def test_default_block_size_is_lowered_to_a_multiple_of_the_group(method):
    case = oracles.layer(2, 518, seed=22, tokens=50)
    result = prune_weight(case.weight, case.hessian, method=method, pattern="3:7")
    groups = result.kept.view(2, -1, 7).sum(2)
    assert groups.unique().tolist() == [3]


def test_a_hessian_of_zeros_falls_back_to_magnitude_and_says_so():
    weight = oracles.layer(4, 8, seed=23).weight
    for pattern in ("unstructured", "2:4", "columns"):
        expected = prune_weight(weight, None, method="magnitude", pattern=pattern, outlier_rows=0.25)
        for method in oracles.METHODS:
            result = prune_weight(
                weight, torch.zeros(8, 8), **oracles.used(method, pattern=pattern, outlier_rows=0.25, block_size=4)
            )
            assert result.method == "magnitude"
            assert torch.equal(result.weight, expected.weight)
            assert torch.equal(result.kept, expected.kept)


def test_outliers_are_found_among_rows_of_very_different_energy():
    # 5 of 6 rows stay dense, so the choice is made among the quiet rows.
    weight = torch.tensor([[1e6], [1.0], [2.0], [3.0], [0.5], [4.0]]).expand(6, 4).contiguous()
    for dtype in (torch.float32, torch.float64):
        result = prune_weight(weight.to(dtype), torch.eye(4, dtype=dtype), sparsity=0.1, outlier_rows=0.8)
        assert result.outliers.tolist() == [0, 1, 2, 3, 5], dtype


def test_errors_are_those_of_the_undamped_hessian_and_of_the_rounded_weight():
    case = oracles.layer(6, 16, seed=24)
    weight, hessian = case.weight.bfloat16(), case.hessian
    result = prune_weight(weight, hessian, damping=0.5)
    assert result.error_after_compensation == pytest.approx(
        oracles.relative_error(weight, result.weight, hessian), rel=1e-9
    )
    assert result.error_before_compensation == pytest.approx(
        oracles.relative_error(weight, torch.where(result.kept, weight, 0.0), hessian), rel=1e-9
    )


@pytest.mark.parametrize("method", oracles.COMPENSATING)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_float32_is_close_to_float64(method, pattern):
    case = oracles.layer(12, 64, tokens=512, seed=25)
    single = prune_weight(
        case.weight.float(), case.hessian.float(), **oracles.used(method, pattern=pattern, block_size=16)
    )
    double = prune_weight(case.weight, case.hessian, **oracles.used(method, pattern=pattern, block_size=16))
    assert single.weight.dtype == torch.float32
    assert (single.kept == double.kept).double().mean() > 0.99
    assert single.error_after_compensation == pytest.approx(double.error_after_compensation, rel=1e-2)
    if torch.equal(single.kept, double.kept):
        assert_close(single.weight.double(), double.weight, rtol=1e-3, atol=1e-4)


def test_methods_are_ordered_as_published_on_a_correlated_layer():
    case = oracles.layer(48, 64, tokens=512, seed=26)
    for pattern in ("unstructured", "2:4"):
        errors = {
            method: prune_weight(case.weight, case.hessian, method=method, pattern=pattern).error_after_compensation
            for method in oracles.METHODS
        }
        assert errors["thanos"] <= errors["sparsegpt"] <= errors["wanda"] <= errors["magnitude"], (pattern, errors)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_rows_that_a_kernel_cannot_solve_are_found_at_the_end_and_solved_directly(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = oracles.layer(24, 64, seed=7)
    arguments = {"method": "thanos", "pattern": "unstructured", "block_size": 16}
    expected = prune_weight(case.weight, case.hessian, **arguments)
    hopes: list[bool] = []
    solve = rows.RowSolver.solve

    def watched(self: rows.RowSolver, *matrices: torch.Tensor) -> torch.Tensor:
        hopes.append(self.defer_convergence_check)
        return solve(self, *matrices)

    def conjugate_gradients(gram, scale, norm, rhs, mask, *limits):  # type: ignore[no-untyped-def]
        exact = rows._direct(gram / scale[:, None] / scale, rhs, mask)
        unsolved = torch.arange(len(rhs)) < share * len(rhs)
        exact[unsolved] = float("nan")
        return exact, unsolved

    kernel = SimpleNamespace(usable=lambda _: True, WIDEST_SYSTEM=16, conjugate_gradients=conjugate_gradients)
    monkeypatch.setattr(rows, "kernels", kernel)
    monkeypatch.setattr(rows.RowSolver, "solve", watched)
    pruned = prune_weight(case.weight, case.hessian, **arguments)
    assert hopes == [True] * 4 + [False] * 4 * (share > 0)
    assert torch.equal(pruned.kept, expected.kept)
    torch.testing.assert_close(pruned.weight, expected.weight)


@pytest.mark.parametrize("method", oracles.METHODS)
def test_an_error_that_cannot_be_measured_is_unknown_and_not_zero(method: str) -> None:
    weight = oracles.layer(6, 16, seed=1).weight
    unseen = prune_weight(weight, torch.zeros(16, 16, dtype=weight.dtype), method=method, sparsity=0.5)
    assert unseen.error_before_compensation is unseen.error_after_compensation is None
    nothing = prune_weight(torch.zeros_like(weight), torch.eye(16, dtype=weight.dtype), method=method, sparsity=0.5)
    assert nothing.error_before_compensation == nothing.error_after_compensation == 0.0  # nothing has changed


def test_outputs_that_were_zero_and_no_longer_are_have_no_relative_error() -> None:
    # Inputs (1, 1) and a weight (1, −1): the output is 0, and with either entry gone it is not.
    pruned = prune_weight(
        torch.tensor([[1.0, -1.0]], dtype=torch.float64),
        torch.ones(2, 2, dtype=torch.float64),
        method="magnitude",
        sparsity=0.5,
    )
    assert pruned.zeros == 1
    assert pruned.error_before_compensation is pruned.error_after_compensation is None
