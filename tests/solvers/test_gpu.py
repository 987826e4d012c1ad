"""The kernels and in-place algorithms on a GPU against the CPU's tensor operations and float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import oracles
from thanos import prune_weight
from thanos.calibration.accumulators import add_gram
from thanos.solvers.hessian import InputStatistics
from thanos.solvers.kernels import solve as kernels
from thanos.solvers.masked_cg import RowSolver
from thanos.solvers.residual_mask import ResidualMask, RowResidualMask
from thanos.solvers.row_selection import row_smallest_mask, smallest_of_rows
from thanos.solvers.row_shards import RowShards
from thanos.solvers.selection import KernelSearch, smallest_mask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

KINDS = ("normal", "tied", "zeros", "denormal", "wide", "constant")


def weights(rows: int, columns: int, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    if kind == "tied":
        weight = (weight * 3).round()
    elif kind == "zeros":
        weight[torch.rand(weight.shape, generator=generator) < 0.4] = 0.0
    elif kind == "denormal":
        weight *= 1e-41
    elif kind == "wide":
        weight = torch.exp(30 * weight).clamp_max(1e37)
    elif kind == "constant":
        weight.fill_(0.7)
    return weight


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_residual_mask_is_that_of_the_cpu_and_no_block_waits_for_the_host(kind, fused, monkeypatch):
    if fused:
        assert kernels.triton is not None
    else:
        monkeypatch.setattr(kernels, "usable", lambda _: False)
    weight = weights(301, 517, kind)
    norms = torch.ones(517) if kind in ("tied", "constant") else torch.rand(517) + 0.1
    zeros = weight == 0 if kind == "zeros" else None
    for budget in (0, 1, 77_777, 301 * 517 // 2, 301 * 517):
        left = torch.tensor(budget)
        here = ResidualMask(norms, zeros, left)
        there = ResidualMask(norms.cuda(), None if zeros is None else zeros.cuda(), left.cuda())
        moved = weight.cuda()
        torch.cuda.synchronize()
        for start, stop in ((0, 128), (128, 200), (200, 500), (500, 517)):
            torch.cuda.set_sync_debug_mode("error")
            try:
                chosen = there.take(moved, start, stop)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert torch.equal(chosen.cpu(), here.take(weight, start, stop)), (budget, start)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("columns", [7, 517, 3000, 12_000, 20_000])
@pytest.mark.parametrize("kind", KINDS)
def test_the_row_budgets_residual_mask_is_that_of_the_cpu_and_no_block_waits(kind, columns, fused, monkeypatch):
    if not fused:
        monkeypatch.setattr(kernels, "usable", lambda _: False)
    rows = 31
    weight = weights(rows, columns, kind)
    norms = torch.ones(columns) if kind in ("tied", "constant") else torch.rand(columns) + 0.1
    zeros = weight == 0 if kind == "zeros" else None
    budgets = torch.linspace(0, columns, rows).long()
    budgets = budgets if zeros is None else budgets.maximum(zeros.sum(1))
    here = RowResidualMask(norms, zeros, budgets)
    there = RowResidualMask(norms.cuda(), None if zeros is None else zeros.cuda(), budgets.cuda())
    moved = weight.cuda()
    edges = sorted({0, min(128, columns), columns // 2, columns - 1, columns})
    torch.cuda.synchronize()
    for start, stop in pairwise(edges):
        torch.cuda.set_sync_debug_mode("error")
        try:
            chosen = there.take(moved, start, stop)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(chosen.cpu(), here.take(weight, start, stop)), start


@pytest.mark.parametrize("kind", KINDS)
def test_row_masks_are_those_of_the_cpu(kind):
    scores = weights(67, 1500, kind).abs()
    scores[scores == 0] = -1.0
    counts = torch.linspace(0, 1500, 67).long()
    assert torch.equal(row_smallest_mask(scores.cuda(), counts.cuda()).cpu(), row_smallest_mask(scores, counts))
    every_other = scores.cuda().repeat_interleave(2, dim=0)[::2]
    norms = torch.ones(1500, device="cuda")
    assert torch.equal(
        smallest_of_rows(every_other[:, 100:], norms[100:], None, (counts // 2).clamp_max(1400).cuda(), 64).cpu(),
        smallest_of_rows(scores[:, 100:], norms[100:].cpu(), None, (counts // 2).clamp_max(1400), 64),
    )


@pytest.mark.parametrize("width", [1, 17, 128, 500])
def test_rows_are_solved_as_in_float64(width):
    case = oracles.layer(70, width, seed=1)
    gram = torch.linalg.inv(oracles.damped(case.hessian, 0.01))
    gram /= gram.diagonal().mean()
    mask = torch.rand(70, width, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[3] = False
    solver = RowSolver()
    for _ in range(2):
        solution = solver.solve(gram.float().cuda(), case.weight.float().cuda(), mask.cuda()).cpu().double()
        for i in range(70):
            p = mask[i].nonzero().squeeze(1)
            assert not solution[i, ~mask[i]].any()
            expected = torch.linalg.solve(gram[p][:, p], case.weight[i, p])
            assert (solution[i, p] - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("zeros", [0.0, 0.2])
@pytest.mark.parametrize("method", oracles.METHODS)
def test_row_budgets_agree_with_float64_on_the_cpu(method, zeros):
    case = oracles.layer(70, 320, seed=3, tokens=2000, dead=[5])
    case.weight[torch.rand(70, 320, generator=torch.Generator().manual_seed(0)) < zeros] = 0.0
    arguments = oracles.used(method, sparsity=0.51, block_size=100, outlier_rows=0.05, scope="row")
    double = prune_weight(case.weight, case.hessian, **arguments)
    single = prune_weight(case.weight.float().cuda(), case.hessian.float().cuda(), **arguments)
    assert int(single.kept.sum()) == int(double.kept.sum())
    counts = single.kept.sum(1).cpu()
    others = torch.ones(70, dtype=torch.bool).index_fill(0, double.outliers, False)
    assert int(counts[others].max() - counts[others].min()) <= 1
    assert (single.kept.cpu() == double.kept).double().mean() > 0.999
    assert single.error_after_compensation == pytest.approx(double.error_after_compensation, rel=2e-3)


@pytest.mark.parametrize("zeros", [0.0, 0.2])
@pytest.mark.parametrize(("pattern", "block_size"), [("unstructured", 100), ("2:4", 128), ("5:8", 160), ("3:20", 40)])
@pytest.mark.parametrize("method", oracles.METHODS)
def test_methods_agree_with_float64_on_the_cpu(method, pattern, block_size, zeros):
    case = oracles.layer(70, 320, seed=3, tokens=2000, dead=[5])
    case.weight[torch.rand(70, 320, generator=torch.Generator().manual_seed(0)) < zeros] = 0.0
    arguments = oracles.used(method, pattern=pattern, block_size=block_size, outlier_rows=0.05)
    double = prune_weight(case.weight, case.hessian, **arguments)
    single = prune_weight(case.weight.float().cuda(), case.hessian.float().cuda(), **arguments)
    assert int(single.kept.sum()) == int(double.kept.sum())
    assert (single.kept.cpu() == double.kept).double().mean() > 0.999
    assert single.error_after_compensation == pytest.approx(double.error_after_compensation, rel=2e-3)
    if torch.equal(single.kept.cpu(), double.kept):
        assert (single.weight.cpu().double() - double.weight).norm() <= 1e-4 * double.weight.norm()


def test_sparsegpts_kernel_does_what_the_tensor_operations_do(monkeypatch):
    case = oracles.layer(100, 384, seed=4, dtype=torch.float32)
    weight, hessian = case.weight.cuda(), case.hessian.cuda()
    for pattern in ("unstructured", "2:4", "4:8"):
        fused = prune_weight(weight, hessian, method="sparsegpt", pattern=pattern)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "usable", lambda _: False)
            plain = prune_weight(weight, hessian, method="sparsegpt", pattern=pattern)
        assert (fused.kept == plain.kept).float().mean() > 0.999
        assert fused.error_after_compensation == pytest.approx(plain.error_after_compensation, rel=1e-3)


def test_the_factor_takes_the_memory_of_one_matrix_beside_the_hessian():
    size = 8192
    inputs = torch.randn(size + 500, size, device="cuda")
    hessian = inputs.T @ inputs
    del inputs
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    statistics = InputStatistics(hessian, hand_over=True)
    assert statistics.matrix.data_ptr() == hessian.data_ptr()
    upper = statistics.factor(0.01).upper
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= 4 * size * size * 1.25, f"{peak / (4 * size * size):.2f} matrices beside the Hessian"
    assert torch.equal(upper, upper.triu())
    probe = torch.randn(size, 1, device="cuda", dtype=torch.float64)
    image = statistics.matrix.double() @ probe + 0.01 * probe
    assert (upper.double().T @ (upper.double() @ image) - probe).norm() <= 1e-2 * probe.norm()


@pytest.mark.parametrize("method", oracles.COMPENSATING)
def test_tf32_is_kept_out_though_the_program_asked_for_it(method):
    case = oracles.layer(256, 1024, seed=5, tokens=3000, dtype=torch.float32)
    weight, hessian = case.weight.cuda(), case.hessian.cuda()
    exact = prune_weight(weight, hessian, method=method)
    torch.set_float32_matmul_precision("high")
    try:
        again = prune_weight(weight, hessian, method=method)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(again.weight, exact.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_of_activations_are_added_up_in_float32(dtype):
    rows = torch.randn(3000, 4500).to(dtype)
    hessian = torch.zeros(4500, 4500, device="cuda")
    torch.set_float32_matmul_precision("high")
    try:
        for part in rows.cuda().split(700):
            add_gram(hessian, part)
    finally:
        torch.set_float32_matmul_precision("highest")
    exact = rows.double().T @ rows.double()
    # Products are exact; tensor cores round sums a little less well than float32 units. TF32 would be off by 1e-4.
    assert (hessian.cpu().double() - exact).norm() <= 1e-5 * exact.norm()


def test_16_bit_products_need_no_second_matrix():
    rows = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    hessian = torch.zeros(4096, 4096, device="cuda")
    add_gram(hessian, rows)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    add_gram(hessian, rows)
    assert torch.cuda.max_memory_allocated() - before < hessian.numel()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "columns"])
@pytest.mark.parametrize("method", ["thanos", "sparsegpt", "wanda"])
def test_a_device_that_is_not_the_current_one_gives_the_same(method, pattern):
    weight, inputs = torch.randn(64, 256), torch.randn(1024, 256)
    results = [prune_weight(weight.to(d), (inputs.T @ inputs).to(d), method=method, pattern=pattern) for d in (0, 1)]
    assert torch.equal(results[0].weight.cpu(), results[1].weight.cpu())
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("zeros", [0.0, 0.1])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "columns"])
@pytest.mark.parametrize("method", oracles.METHODS)
def test_column_major_weights_are_pruned_like_row_major_ones(method, pattern, zeros):
    """As the layers of GPT-2 come, whose weights are stored transposed. Without outlier rows nothing copies them on the way."""
    case = oracles.layer(96, 64, seed=5)
    weight, hessian = case.weight.float().cuda(), case.hessian.float().cuda()
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)).cuda() < zeros] = 0.0
    expected = prune_weight(weight, hessian, **oracles.used(method, pattern=pattern, block_size=32))
    result = prune_weight(weight.T.contiguous().T, hessian, **oracles.used(method, pattern=pattern, block_size=32))
    assert torch.equal(result.kept, expected.kept)
    torch.testing.assert_close(result.weight, expected.weight, rtol=1e-4, atol=1e-5)


def test_kernels_refuse_matrices_whose_rows_are_not_contiguous():
    scores = torch.rand(8, 16, device="cuda").T
    with pytest.raises(AssertionError):
        KernelSearch().smallest(scores, None, None, torch.tensor(3, device="cuda"))
    assert int(smallest_mask(scores, 3).sum()) == 3


class Recording(RowShards):
    """Notes what this process would add up with the others'; between processes these must match call by call."""

    size = 2

    def __init__(self):
        self.shapes = []

    def sum_(self, counts):
        self.shapes.append((counts.shape, counts.dtype))
        return counts


@pytest.mark.parametrize("shape", [(24, 16), (24,)])
def test_a_process_without_rows_takes_part_in_every_sum(shape):
    """Of a matrix with few rows some processes hold none, and would wait for ever in a sum that the others leave out."""
    with_rows, without = Recording(), Recording()
    smallest_mask(torch.rand(shape, device="cuda"), 5, with_rows)
    none = torch.empty(0, *shape[1:], device="cuda")
    assert smallest_mask(none, 5, without).shape == none.shape
    assert with_rows.shapes == without.shapes
