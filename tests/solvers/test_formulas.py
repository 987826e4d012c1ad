"""The formulas of the solvers against direct least squares, explicit inverses and sorting, all in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import oracles
from thanos import prune_weight
from thanos.errors import NumericsError
from thanos.patterns.rounding import ceil_count, floor_count
from thanos.solvers.hessian import SMALLEST_RAISED_DAMPING, InputStatistics, factorize
from thanos.solvers.masked_cg import MAX_STEPS, RowSolver
from thanos.solvers.row_selection import even_rows_mask, nm_mask, row_smallest_mask
from thanos.solvers.selection import smallest_mask

QUICK = settings(max_examples=25, deadline=None, derandomize=True)
SEEDS = st.integers(0, 10_000)
SPARSITIES = st.sampled_from([0.05, 0.29, 0.5, 0.7])
DAMPINGS = st.sampled_from([1e-4, 0.01, 0.3])
ALPHAS = st.sampled_from([0.0, 0.1, 0.25])


def random_mask(rows: int, columns: int, share: float, seed: int) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < share


def assert_near(actual: torch.Tensor, expected: torch.Tensor, relative: float = 1e-6) -> None:
    assert actual.dtype == expected.dtype == torch.float64
    assert (actual - expected).norm() <= relative * expected.norm()


# --- the oracles agree with one another, so that they may judge -------------------------------------------------------


@QUICK
@given(rows=st.integers(1, 5), columns=st.integers(2, 14), tokens=st.integers(1, 40), share=st.floats(0, 1), seed=SEEDS)
def test_formula_a_is_the_least_squares_solution_on_the_support(rows, columns, tokens, share, seed):
    case = oracles.layer(rows, columns, tokens=tokens, seed=seed)
    remove = random_mask(rows, columns, share, seed)
    expected = oracles.least_squares(case.weight, ~remove, case.inputs, 0.01)
    hessian = oracles.damped(case.hessian, 0.01)
    actual = torch.stack([oracles.formula_a(w, p, hessian) for w, p in zip(case.weight, remove, strict=True)])
    assert_close(actual, expected, rtol=1e-6, atol=1e-7)


# --- formula (A): one block, every row its own set --------------------------------------------------------------------


@QUICK
@given(
    rows=st.integers(1, 9),
    columns=st.integers(2, 40),
    tokens=st.integers(1, 100),
    sparsity=SPARSITIES,
    damping=DAMPINGS,
    alpha=ALPHAS,
    seed=SEEDS,
)
def test_one_block_of_thanos_is_the_optimum_of_its_mask(rows, columns, tokens, sparsity, damping, alpha, seed):
    prunable = (rows - oracles.outlier_count(alpha, rows)) * columns
    assume(prunable and oracles.weights_to_remove(sparsity, rows, columns) <= prunable)
    case = oracles.layer(rows, columns, tokens=tokens, seed=seed)
    result = prune_weight(
        case.weight, case.hessian, sparsity=sparsity, damping=damping, outlier_rows=alpha, block_size=columns
    )
    assert result.damping == damping
    assert int((~result.kept).sum()) == oracles.weights_to_remove(sparsity, rows, columns)
    optimum = oracles.least_squares(case.weight, result.kept, case.inputs, damping)
    assert (result.weight - optimum).norm() <= 1e-6 * case.weight.norm()


@pytest.mark.parametrize("damping", [1e-4, 0.01, 1.0])
@pytest.mark.parametrize("tokens", [5, 200])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1:8"])
def test_a_block_as_wide_as_one_row_gives_the_optimum_of_that_row(pattern, tokens, damping):
    case = oracles.layer(1, 24, tokens=tokens, seed=3)
    result = prune_weight(case.weight, case.hessian, pattern=pattern, block_size=24, damping=damping)
    assert_near(result.weight, oracles.least_squares(case.weight, result.kept, case.inputs, damping))


# --- formula (B): one set for all rows --------------------------------------------------------------------------------


@QUICK
@given(
    rows=st.integers(1, 9),
    columns=st.integers(3, 40),
    tokens=st.integers(1, 100),
    sparsity=st.sampled_from([0.05, 0.29, 0.5]),
    damping=DAMPINGS,
    alpha=ALPHAS,
    seed=SEEDS,
)
def test_thanos_columns_is_the_optimum_on_the_columns_that_stay(rows, columns, tokens, sparsity, damping, alpha, seed):
    assume(oracles.outlier_count(alpha, rows) < rows)
    count = oracles.columns_to_remove(sparsity, columns, alpha)
    assume(count < columns)
    case = oracles.layer(rows, columns, tokens=tokens, seed=seed)
    result = prune_weight(
        case.weight, case.hessian, pattern="columns", sparsity=sparsity, damping=damping, outlier_rows=alpha
    )
    pruned = [i for i in range(rows) if i not in result.outliers.tolist()]
    gone = ~result.kept[pruned].any(0)
    assert int(gone.sum()) == count
    optimum = oracles.least_squares(case.weight, result.kept, case.inputs, damping)
    assert (result.weight - optimum).norm() <= 1e-6 * case.weight.norm()
    hessian = oracles.damped(case.hessian, damping)
    expected = oracles.formula_b(case.weight[pruned], gone, hessian)
    assert (result.weight[pruned] - expected).norm() <= 1e-6 * case.weight.norm()


@pytest.mark.parametrize("seed", range(4))
def test_the_two_misprinted_formulas_are_worse_even_than_doing_nothing(seed):
    case = oracles.layer(24, 32, tokens=256, seed=seed)
    result = prune_weight(case.weight, case.hessian, pattern="columns", sparsity=0.25)
    gone = ~result.kept.any(0)
    hessian = oracles.damped(case.hessian, 0.01)

    def error(weight: torch.Tensor) -> float:
        return oracles.relative_error(case.weight, weight, case.hessian)

    nothing = error(torch.where(gone, 0.0, case.weight))
    assert error(result.weight) < 0.9 * nothing
    assert error(oracles.misprint_eq72(case.weight, gone, hessian)) > nothing
    assert error(oracles.misprint_algorithm7(case.weight, gone, hessian)) > nothing


# --- recursions, given the mask ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("tokens", [6, 200])
def test_thanos_blocks_are_formula_a_on_the_trailing_hessian(pattern, tokens):
    case = oracles.layer(5, 20, tokens=tokens, seed=1)
    for block_size in (4, 8, 12):  # the last block is partial for 8 and 12
        result = prune_weight(case.weight, case.hessian, pattern=pattern, block_size=block_size)
        expected = oracles.blockwise_obs(
            case.weight, ~result.kept, oracles.damped(case.hessian, 0.01), block_size=block_size
        )
        assert_near(result.weight, expected)


def test_thanos_with_blocks_of_one_column_is_optimal_brain_surgeon():
    case = oracles.layer(6, 17, seed=2)
    result = prune_weight(case.weight, case.hessian, block_size=1)
    assert_near(
        result.weight, oracles.sequential_obs(case.weight, ~result.kept, oracles.damped(case.hessian, 0.01)), 1e-9
    )


@pytest.mark.parametrize("block_size", [1, 5, 16, 40])
def test_sparsegpt_is_optimal_brain_surgeon_for_its_mask_whatever_the_block_size(block_size):
    case = oracles.layer(5, 37, seed=4)  # wider than two panels of 16, and 37 is divided by nothing
    result = prune_weight(case.weight, case.hessian, method="sparsegpt", block_size=block_size)
    assert_near(
        result.weight, oracles.sequential_obs(case.weight, ~result.kept, oracles.damped(case.hessian, 0.01)), 1e-9
    )


@pytest.mark.parametrize(("pattern", "block_size"), [("2:4", 8), ("3:5", 10), ("5:20", 20), ("columns", 7)])
def test_sparsegpt_recursion_with_groups_and_columns(pattern, block_size):
    case = oracles.layer(4, 40, seed=5)
    result = prune_weight(case.weight, case.hessian, method="sparsegpt", pattern=pattern, block_size=block_size)
    assert_near(
        result.weight, oracles.sequential_obs(case.weight, ~result.kept, oracles.damped(case.hessian, 0.01)), 1e-9
    )


# --- the factor -------------------------------------------------------------------------------------------------------


@QUICK
@given(columns=st.integers(1, 24), tokens=st.integers(1, 60), damping=DAMPINGS, seed=SEEDS)
def test_one_factor_holds_the_inverse_of_every_trailing_matrix(columns, tokens, damping, seed):
    case = oracles.layer(1, columns, tokens=tokens, seed=seed)
    factor = factorize(case.hessian, damping)
    upper = factor.upper
    assert factor.damping == damping
    assert factor.reason == ""
    assert torch.equal(upper, upper.triu())
    hessian = (
        oracles.damped(case.hessian, damping) / case.hessian.diagonal().mean()
    )  # U is that of a mean diagonal of 1
    for j in range(columns):
        expected = torch.linalg.inv(hessian[j:, j:])
        assert_near(upper[j:, j:].T @ upper[j:, j:], expected)


def test_the_first_rows_of_a_trailing_inverse_need_the_block_row_of_the_factor_only():
    case = oracles.layer(1, 12, seed=6)
    upper = factorize(case.hessian, 0.01).upper
    hessian = oracles.damped(case.hessian, 0.01) / case.hessian.diagonal().mean()
    inverse = torch.linalg.inv(hessian[4:, 4:])
    block = upper[4:8, 4:8]
    assert_near(block.T @ upper[4:8, 4:], inverse[:4])


def test_factor_does_not_touch_the_hessian_and_is_computed_once():
    case = oracles.layer(1, 8, seed=7)
    before = case.hessian.clone()
    inputs = InputStatistics(case.hessian, dtype=torch.float64)
    matrix = inputs.matrix.clone()
    first = inputs.factor(0.01)
    assert inputs.factor(0.01) is first
    assert inputs.factor(0.1) is not first
    assert torch.equal(case.hessian, before)
    assert torch.equal(inputs.matrix, matrix)


def test_statistics_are_divided_by_the_mean_diagonal():
    case = oracles.layer(1, 8, seed=8, dead=[3])
    inputs = InputStatistics(case.hessian, dtype=torch.float64)
    mean = case.hessian.diagonal().mean()
    assert_close(inputs.matrix, case.hessian / mean)
    assert_close(inputs.norms, case.inputs.norm(dim=0) / mean.sqrt())
    assert inputs.dead.tolist() == [j == 3 for j in range(8)]
    assert not inputs.empty
    assert InputStatistics(torch.zeros(3, 3)).empty


def test_dead_columns_have_no_influence_on_the_others():
    case = oracles.layer(1, 9, seed=9, dead=[0, 4])
    alive = [1, 2, 3, 5, 6, 7, 8]
    upper = factorize(case.hessian, 0.01).upper
    hessian = oracles.damped(case.hessian, 0.01) / case.hessian.diagonal().mean()
    inverse = upper.T @ upper
    assert_near(inverse[alive][:, alive], torch.linalg.inv(hessian[alive][:, alive]))
    assert torch.equal(inverse[[0, 4]][:, alive], torch.zeros(2, 7, dtype=torch.float64))


def test_damping_is_raised_tenfold_until_the_hessian_can_be_factorised():
    hessian = torch.diag(torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64))
    hessian[0, 1] = hessian[1, 0] = 1.04  # eigenvalues 2.04, −0.04 and 2; mean diagonal 4/3, so −0.04 is −0.03 of it
    factor = factorize(hessian, 0.001)
    assert factor.damping == pytest.approx(0.1)
    assert factor.reason == "not positive definite with damping 0.001, 0.01"
    damped = hessian / (4 / 3) + 0.1 * torch.eye(3, dtype=torch.float64)
    assert_near(factor.upper.T @ factor.upper, torch.linalg.inv(damped))
    result = prune_weight(torch.ones(2, 3, dtype=torch.float64), hessian, damping=0.001)
    assert result.damping == pytest.approx(0.1)
    assert "not positive definite" in result.damping_reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_raising_from_no_damping_begins_at_a_millionth(dtype):
    factor = factorize(torch.ones(4, 4, dtype=dtype), 0.0)
    assert factor.damping >= SMALLEST_RAISED_DAMPING == 1e-6
    assert factor.damping <= 1e-4
    assert factor.reason.startswith("not positive definite with damping 0")
    assert bool(torch.isfinite(factor.upper).all())


def test_a_matrix_that_is_no_hessian_is_refused():
    indefinite = torch.tensor([[1.0, 1e9], [1e9, 1.0]], dtype=torch.float64)
    with pytest.raises(NumericsError, match="not XᵀX"):
        factorize(indefinite, 0.01)
    with pytest.raises(NumericsError, match="negative diagonal"):
        factorize(torch.diag(torch.tensor([1.0, -1.0])), 0.01)


def test_condition_is_estimated_from_below():
    case = oracles.layer(1, 16, tokens=400, seed=10)
    eigenvalues = torch.linalg.eigvalsh(oracles.damped(case.hessian, 0.01))
    true = (eigenvalues[-1] / eigenvalues[0]).item()
    estimate = InputStatistics(case.hessian, dtype=torch.float64).condition(0.01, steps=60)
    assert 0.9 * true <= estimate <= true * (1 + 1e-6)


# --- the rows' systems ------------------------------------------------------------------------------------------------


@QUICK
@given(rows=st.integers(1, 6), size=st.integers(1, 30), share=st.floats(0, 1), seed=SEEDS)
def test_rows_are_solved_on_their_own_supports(rows, size, share, seed):
    gram = oracles.damped(oracles.layer(1, size, seed=seed).hessian, 0.01)
    rhs = oracles.layer(rows, size, seed=seed + 1).weight
    mask = random_mask(rows, size, share, seed)
    before = gram.clone(), rhs.clone(), mask.clone()
    solution = RowSolver().solve(gram, rhs, mask)
    assert all(torch.equal(a, b) for a, b in zip(before, (gram, rhs, mask), strict=True))
    for i in range(rows):
        p = mask[i].nonzero().squeeze(1)
        assert not solution[i, ~mask[i]].any()
        if p.numel():
            assert_close(solution[i, p], torch.linalg.solve(gram[p][:, p], rhs[i, p]), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("with_root", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_systems_that_the_iteration_cannot_solve_are_solved_directly(dtype, with_root):
    size = 160
    root = torch.diag(torch.logspace(0, -3, size, dtype=torch.float64))
    root += torch.triu(oracles.layer(size, size, seed=3).weight, 1) * 1e-3
    root = root.to(dtype)
    gram = root.double().T @ root.double()
    rhs = oracles.layer(3, size, seed=4).weight
    mask = random_mask(3, size, 0.9, 5)
    mask[2] = False
    solution = RowSolver().solve(gram.to(dtype), rhs.to(dtype), mask, root if with_root else None)
    assert solution.dtype == dtype
    assert size > 2 * MAX_STEPS
    exact = gram if with_root or dtype == torch.float64 else gram.to(dtype).double()
    for i in range(3):
        p = mask[i].nonzero().squeeze(1)
        assert not solution[i, ~mask[i]].any()
        expected = torch.linalg.solve(exact[p][:, p], rhs.to(dtype).double()[i, p])
        assert (solution[i, p].double() - expected).norm() <= (
            1e-5 if dtype == torch.float32 else 1e-7
        ) * expected.norm()


def test_a_singular_system_still_gives_a_finite_solution_that_fits():
    gram = torch.ones(4, 4, dtype=torch.float64)
    rhs = torch.tensor([[2.0, 2.0, 2.0, 2.0], [3.0, 3.0, 0.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    solution = RowSolver().solve(gram, rhs, mask)
    assert_close(torch.where(mask, solution @ gram, 0.0), rhs)


# --- selection --------------------------------------------------------------------------------------------------------

TIED = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=40)


@QUICK
@given(scores=TIED, data=st.data(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_smallest_mask_takes_exactly_the_smallest_the_lower_index_first(scores, data, dtype):
    count = data.draw(st.integers(0, len(scores)))
    tensor = torch.tensor(scores, dtype=dtype)
    mask = smallest_mask(tensor, count)
    assert mask.dtype == torch.bool
    assert mask.nonzero().squeeze(1).tolist() == sorted(oracles.smallest(scores, count))
    assert torch.equal(smallest_mask(tensor, torch.tensor(count)), mask)


def test_smallest_mask_keeps_the_shape_and_bounds_the_count():
    scores = torch.tensor([[3.0, 1.0], [2.0, 0.0]])
    assert smallest_mask(scores, 2).tolist() == [[False, True], [False, True]]
    assert not smallest_mask(scores, -1).any()
    assert smallest_mask(scores, 9).all()
    assert smallest_mask(scores.T, 1).tolist() == [[False, False], [False, True]]


@QUICK
@given(rows=st.integers(1, 5), columns=st.integers(1, 9), data=st.data())
def test_row_masks_take_the_smallest_of_each_row(rows, columns, data):
    values = data.draw(st.lists(st.integers(-1, 4), min_size=rows * columns, max_size=rows * columns))
    scores = torch.tensor(values, dtype=torch.float32).view(rows, columns)
    counts = data.draw(st.lists(st.integers(0, columns), min_size=rows, max_size=rows))
    mask = row_smallest_mask(scores, torch.tensor(counts))
    expected = torch.stack([oracles.smallest_of(row, count) for row, count in zip(scores, counts, strict=True)])
    assert torch.equal(mask, expected)
    same = row_smallest_mask(scores, counts[0])
    assert torch.equal(same, torch.stack([oracles.smallest_of(row, counts[0]) for row in scores]))


@QUICK
@given(rows=st.integers(1, 6), columns=st.integers(1, 8), data=st.data())
def test_even_rows_mask_gives_every_row_the_same_number_up_to_one(rows, columns, data):
    values = data.draw(st.lists(st.integers(-1, 6), min_size=rows * columns, max_size=rows * columns))
    scores = torch.tensor(values, dtype=torch.float32).view(rows, columns)
    count = data.draw(st.integers(0, rows * columns))
    mask = even_rows_mask(scores, count)
    taken, zeros = mask.sum(1), (scores < 0).sum(1)
    assert bool(mask[scores < 0].all())
    assert int(taken.sum()) == max(count, int(zeros.sum()))
    for row, number in zip(range(rows), taken.tolist(), strict=True):
        assert torch.equal(mask[row], oracles.smallest_of(scores[row], number))
    if bool((taken > zeros).any()):
        most = int(taken[taken > zeros].max())
        assert int(taken.min()) >= most - 1, "a row gave less than others while none of them had to"
        following = scores.sort(1).values[:, most - 1]
        chosen, left = (taken == most) & (zeros < most), taken == most - 1
        if bool(left.any()):
            assert following[chosen].max() <= following[left].min()


@QUICK
@given(rows=st.integers(1, 4), groups=st.integers(1, 4), m=st.integers(2, 8), data=st.data())
def test_nm_mask_takes_m_minus_n_of_every_group(rows, groups, m, data):
    n = data.draw(st.integers(1, m - 1))
    values = data.draw(st.lists(st.integers(-1, 4), min_size=rows * groups * m, max_size=rows * groups * m))
    scores = torch.tensor(values, dtype=torch.float32).view(rows, groups * m)
    assert torch.equal(nm_mask(scores, n, m), oracles.groups_of(scores, n, m))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["normal", "tied", "zeros", "tiny", "wide"])
def test_the_gpu_selects_the_same_entries(kind):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(257, 384, generator=generator).abs()
    if kind == "tied":
        scores = (scores * 4).round()
    elif kind == "zeros":
        scores[torch.rand(scores.shape, generator=generator) < 0.5] = 0.0
        scores[torch.rand(scores.shape, generator=generator) < 0.2] = -1.0
    elif kind == "tiny":
        scores *= 1e-42  # denormal
    elif kind == "wide":
        scores = torch.exp(40 * torch.randn(257, 384, generator=generator))
    for count in (0, 1, 2, 1000, scores.numel() // 2, scores.numel() - 1, scores.numel()):
        assert torch.equal(smallest_mask(scores.cuda(), count).cpu(), smallest_mask(scores, count)), count


# --- whole numbers ----------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None, derandomize=True)
@given(percent=st.integers(0, 99), size=st.integers(1, 100_000))
def test_counts_forgive_the_rounding_of_the_product(percent, size):
    share = percent / 100
    assert floor_count(share * size) == percent * size // 100
    assert ceil_count(share * size) == -(-percent * size // 100)


def test_counts_of_the_known_traps():
    assert floor_count(0.29 * 100) == 29
    assert ceil_count(0.1 * 30) == 3
    assert ceil_count(0.3 * 70 / (1 - 0.3)) == 30
    assert floor_count(0.7 * 14336 * 4096) == 41104179
