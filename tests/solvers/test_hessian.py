"""The factor's memory, its check and its fallback; and that float32 means float32."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import oracles
from thanos import prune_weight
from thanos.calibration.accumulators import add_gram
from thanos.solvers import hessian as factor_module
from thanos.solvers.hessian import InputStatistics, factorize, residual
from thanos.solvers.masked_cg import RowSolver
from thanos.solvers.precision import full_float32


class LargeAllocations(TorchDispatchMode):
    """Counts the distinct memories of at least ``size`` entries that operations return."""

    def __init__(self, size: int, *known: torch.Tensor) -> None:
        super().__init__()
        self._size, self._known = size, {tensor.untyped_storage().data_ptr() for tensor in known}
        self.found: list[torch.Tensor] = []  # kept alive, or an address might be used twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() >= self._size:
                address = tensor.untyped_storage().data_ptr()
                if address not in self._known:
                    self._known.add(address)
                    self.found.append(tensor)
        return result


def test_the_factor_allocates_one_matrix_beside_a_hessian_that_is_handed_over():
    size = 1700  # four panels, the last one narrower
    inputs = torch.randn(2000, size)
    hessian = inputs.T @ inputs
    expected = hessian / hessian.diagonal().double().mean().float()
    with LargeAllocations(4 * size * size // 2, hessian) as allocations:
        statistics = InputStatistics(hessian, hand_over=True)
        upper = statistics.factor(0.01).upper
    assert len(allocations.found) == 1, [tensor.shape for tensor in allocations.found]
    assert statistics.matrix.data_ptr() == hessian.data_ptr()
    torch.testing.assert_close(statistics.matrix, expected, rtol=1e-5, atol=1e-6)
    damped = statistics.matrix.double() + 0.01 * torch.eye(size, dtype=torch.float64)
    image = upper.double() @ damped @ upper.double().T
    assert (image - torch.eye(size, dtype=torch.float64)).abs().max() < 1e-3
    assert torch.equal(upper, upper.triu())


@pytest.mark.parametrize("size", [1, 2, 3, 511, 512, 513, 1025])
def test_the_factor_is_right_at_every_size_of_the_last_panel(size):
    case = oracles.layer(1, size, tokens=size + 50, seed=1)
    upper = factorize(case.hessian, 0.01).upper
    damped = oracles.damped(case.hessian, 0.01) / case.hessian.diagonal().mean()
    assert torch.equal(upper, upper.triu())
    assert (upper @ damped @ upper.T - torch.eye(size, dtype=torch.float64)).abs().max() < 1e-8


def test_the_residual_tells_a_wrong_factor():
    case = oracles.layer(1, 40, seed=2)
    statistics = InputStatistics(case.hessian, dtype=torch.float64)
    upper = statistics.factor(0.01).upper
    assert residual(statistics.matrix, statistics.dead, 0.01, upper) < 1e-12
    assert 0.01 < residual(statistics.matrix, statistics.dead, 0.01, upper * 1.02) < 0.1
    assert residual(statistics.matrix, statistics.dead, 0.01, upper * float("nan")) == float("inf")


def test_a_factor_that_fails_its_check_is_computed_in_float64(monkeypatch):
    inputs = torch.randn(30, 60, generator=torch.Generator().manual_seed(0))
    hessian = inputs.T @ inputs
    single = factorize(hessian, 1e-4).upper
    monkeypatch.setattr(factor_module, "RESIDUAL", 0.0)
    double = factorize(hessian, 1e-4)
    assert double.upper.dtype == torch.float32
    assert double.damping == 1e-4
    matrix = InputStatistics(hessian).matrix.double()
    expected = factor_module._upper_inverse_factor(matrix, torch.zeros(60, dtype=torch.bool), 1e-4, torch.float64)
    torch.testing.assert_close(double.upper.double(), expected, rtol=1e-6, atol=1e-6)
    assert not torch.equal(double.upper, single)


@pytest.mark.parametrize("asked", ["high", "medium", "highest"])
def test_reduced_precision_is_off_within_and_as_asked_afterwards(asked, monkeypatch):
    seen = []
    original = factor_module._factorize

    def spy(*arguments):
        seen.append((torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision))
        return original(*arguments)

    monkeypatch.setattr(factor_module, "_factorize", spy)
    case = oracles.layer(4, 12, seed=3, dtype=torch.float32)
    torch.set_float32_matmul_precision(asked)
    try:
        prune_weight(case.weight, case.hessian)
        factorize(case.hessian)
        add_gram(torch.zeros(12, 12), torch.randn(5, 12))
        assert torch.get_float32_matmul_precision() == asked
        with pytest.raises(ZeroDivisionError), full_float32():
            raise ZeroDivisionError
        assert torch.get_float32_matmul_precision() == asked
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == [("ieee", "ieee")] * 2


def test_the_condition_number_is_that_of_float32():
    statistics = InputStatistics(oracles.layer(1, 12, seed=3, dtype=torch.float32).hessian)
    statistics.factor(0.01)
    seen = set()

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mm.default:
                seen.add((torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision))
            return func(*args, **(kwargs or {}))

    torch.set_float32_matmul_precision("high")
    try:
        with Look():
            statistics.condition(0.01)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == {("ieee", "ieee")}


HARD = {
    "few tokens": {"tokens": 12},
    "near-duplicates": {"tokens": 400, "duplicates": [(j, j - 1) for j in range(1, 64, 2)]},
}


@pytest.mark.parametrize("damping", [1e-6, 1e-4])
@pytest.mark.parametrize("kind", HARD)
def test_rows_of_ill_conditioned_hessians_are_solved_as_in_float64(kind, damping):
    case = oracles.layer(40, 64, seed=4, **HARD[kind])
    noise = 1e-3 * oracles.layer(64, 64, seed=5).weight
    hessian = case.hessian + noise @ noise.T
    root = factorize(hessian.float(), damping).upper
    gram, weight = root.double().T @ root.double(), case.weight.float()
    mask = torch.rand(40, 64, generator=torch.Generator().manual_seed(6)) < 0.5
    solver = RowSolver()
    solution = solver.solve(root.T @ root, weight, mask, root)
    for i in range(40):
        p = mask[i].nonzero().squeeze(1)
        rhs = weight[i, p].double()
        exact = torch.linalg.solve(gram[p][:, p], rhs)
        # Within what float32 data can tell: the loss w · x, which is what a removal costs, to one part in a hundred.
        assert abs(rhs @ solution[i, p].double() - rhs @ exact) <= 1e-2 * abs(rhs @ exact)
        assert not solution[i, ~mask[i]].any()
