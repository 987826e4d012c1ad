"""The exchange of units after the greedy choice: every swap against least squares, the end against all subsets."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from helpers import benchmark_script
from thanos.solvers.unit_removal import greedy_units

exchange = benchmark_script("exchange")

COLUMNS, REMOVED = 12, 4


def layer(seed: int) -> tuple[Tensor, Tensor]:
    """A weight, (6, COLUMNS), and XᵀX of correlated inputs, in float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator, dtype=torch.float64)
    inputs = torch.randn(200, COLUMNS, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(6, COLUMNS, generator=generator, dtype=torch.float64), inputs.T @ inputs


def mask(gone: tuple[int, ...]) -> Tensor:
    return torch.zeros(COLUMNS, dtype=torch.bool).index_fill_(0, torch.tensor(gone), True)


def least(weight: Tensor, hessian: Tensor, gone: Tensor) -> float:
    """The least error without the columns ``gone``, by least squares on a root of the Hessian."""
    root = torch.linalg.cholesky(hessian).T
    wanted = root @ weight.T
    found = torch.linalg.lstsq(root[:, ~gone], wanted).solution
    return float((root[:, ~gone] @ found - wanted).square().sum())


@pytest.mark.parametrize("seed", range(3))
def test_the_change_by_a_swap_is_that_of_least_squares(seed: int) -> None:
    weight, hessian = layer(seed)
    gone = mask((0, 3, 4, 9))
    before, inverse = least(weight, hessian, gone), hessian.inverse()
    assert exchange.error(weight, inverse, gone) == pytest.approx(before, rel=1e-9)
    changes = exchange.swap_changes(weight, inverse, gone)
    for row, enters in enumerate((~gone).nonzero().flatten().tolist()):
        for column, leaves in enumerate(gone.nonzero().flatten().tolist()):
            tried = gone.clone()
            tried[enters], tried[leaves] = True, False
            wanted = least(weight, hessian, tried) - before
            assert float(changes[row, column]) == pytest.approx(wanted, rel=1e-7, abs=1e-7 * before)


@pytest.mark.parametrize("seed", range(8))
def test_the_error_never_rises_and_no_swap_lowers_it_further(seed: int) -> None:
    weight, hessian = layer(seed)
    inverse = hessian.inverse()
    greedy = greedy_units(weight, inverse, torch.arange(COLUMNS)[:, None], REMOVED, steps=2)
    found, error, swaps = exchange.exchanged(weight, inverse, greedy)
    before, best = (
        least(weight, hessian, greedy),
        min(least(weight, hessian, mask(gone)) for gone in combinations(range(COLUMNS), REMOVED)),
    )
    assert int(found.sum()) == REMOVED
    assert error == pytest.approx(least(weight, hessian, found), rel=1e-9)
    assert best * (1 - 1e-9) <= error <= before * (1 + 1e-9)
    assert (swaps > 0) == (error < before * (1 - 1e-9))
    assert float(exchange.swap_changes(weight, inverse, found).min()) > -1e-7 * before
