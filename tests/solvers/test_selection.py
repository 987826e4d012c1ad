"""Exact selection over one process and over several, against Python's sort."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from thanos import registry
from thanos.patterns.budget import Budget
from thanos.recipe import LayerRecipe
from thanos.solvers.hessian import InputStatistics
from thanos.solvers.problem import Problem, Solution
from thanos.solvers.row_selection import even_rows_mask
from thanos.solvers.row_shards import ALONE, RowShards
from thanos.solvers.selection import kth_on_cpu, smallest_mask

QUICK = settings(max_examples=40, deadline=None, derandomize=True)


class Threads:
    """RowShards that are threads of this process; sums meet at a barrier."""

    def __init__(self, rank: int, board: list, barrier: threading.Barrier) -> None:
        self.rank, self.size, self._board, self._barrier = rank, len(board), board, barrier

    def _all(self, counts: torch.Tensor) -> list[torch.Tensor]:
        assert not counts.is_floating_point(), "only integers add up to the same in every order"
        self._board[self.rank] = counts.clone()
        self._barrier.wait()
        everything = list(self._board)
        self._barrier.wait()
        return everything

    def sum_(self, counts: torch.Tensor) -> torch.Tensor:
        return counts.copy_(torch.stack(self._all(counts)).sum(0))

    def before(self, counts: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.zeros_like(counts), *self._all(counts)[: self.rank]]).sum(0)


def together(size: int, work) -> list:
    """Run ``work(row_shards)`` in ``size`` threads; return the results by rank."""
    board, barrier = [None] * size, threading.Barrier(size, timeout=600)  # however busy the machine
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, [Threads(rank, board, barrier) for rank in range(size)]))


def split(rows: int, size: int) -> list[slice]:
    """Uneven shares in order of rank, some of them empty if there are few rows."""
    bounds = [rows * rank * rank // (size * size) for rank in range(size + 1)]
    return [slice(a, b) for a, b in pairwise(bounds)]


def kinds(rows: int, columns: int, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(rows, columns, generator=generator).abs()
    if kind == "tied":
        scores = (scores * 4).round()
    elif kind == "zeros":
        scores[torch.rand(scores.shape, generator=generator) < 0.5] = 0.0
        scores[torch.rand(scores.shape, generator=generator) < 0.2] = -1.0
    elif kind == "denormal":
        scores *= 1e-42
    elif kind == "wide":
        scores = torch.exp(40 * torch.randn(rows, columns, generator=generator)).clamp_max(3e38)
    elif kind == "constant":
        scores.fill_(0.7)
    elif kind == "by column":  # one in 64 columns is large, so that a sample with a bad stride would be misled
        scores[:, ::64] += 100
    return scores


KINDS = ("normal", "tied", "zeros", "denormal", "wide", "constant", "by column")


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_is_that_of_sorting_whoever_holds_the_rows(kind, dtype, size):
    scores = kinds(23, 17, kind).to(dtype)
    for count in (-3, 0, 1, 2, 100, 195, 390, 391, 500):
        expected = oracles.smallest_of(scores, max(0, count))
        if size == 1:
            assert torch.equal(smallest_mask(scores, count), expected)
        parts = together(
            size, lambda p, k=count: smallest_mask(scores[split(23, p.size)[p.rank]], torch.tensor(k), _Several(p))
        )
        assert torch.equal(torch.cat(parts), expected), count


class _Several:
    """The same row_shards, never taking the short way of a single process."""

    def __init__(self, row_shards: RowShards) -> None:
        self.rank, self.size, self.sum_, self.before = (
            row_shards.rank,
            max(2, row_shards.size),
            row_shards.sum_,
            row_shards.before,
        )


@pytest.mark.parametrize("kind", KINDS)
def test_many_entries_are_bracketed_by_a_sample_and_still_exact(kind):
    scores = kinds(700, 512, kind)
    order = scores.reshape(-1).sort(stable=True).indices
    for count in (1, 2, 7777, scores.numel() // 2, scores.numel() - 1):
        expected = torch.zeros(scores.numel(), dtype=torch.bool)
        expected[order[:count]] = True
        assert torch.equal(smallest_mask(scores, count), expected.view(scores.shape)), count


def test_a_sample_that_misleads_does_no_harm():
    scores = torch.ones(1 << 18)
    scores[:: (1 << 18) // (1 << 14) | 1] = 5.0  # all that the sample sees
    scores[3] = 0.5
    assert kth_on_cpu(scores, 1) == (0.5, 1, 1)
    assert kth_on_cpu(scores, 10) == (1.0, int((scores == 1).sum()), 9)


@QUICK
@given(rows=st.integers(1, 6), columns=st.integers(1, 8), size=st.integers(2, 3), data=st.data())
def test_even_rows_do_not_depend_on_who_holds_them(rows, columns, size, data):
    values = data.draw(st.lists(st.integers(-1, 6), min_size=rows * columns, max_size=rows * columns))
    scores = torch.tensor(values, dtype=torch.float32).view(rows, columns)
    count = data.draw(st.integers(0, rows * columns))
    parts = together(size, lambda p: even_rows_mask(scores[split(rows, size)[p.rank]], count, p))
    assert torch.equal(torch.cat(parts), even_rows_mask(scores, count))


@pytest.mark.parametrize("zeros", [0.0, 0.2])
@pytest.mark.parametrize(("pattern", "scope"), [("unstructured", "layer"), ("unstructured", "row"), ("2:4", None)])
@pytest.mark.parametrize("method", oracles.METHODS)
def test_methods_give_the_same_mask_and_weight_however_the_rows_are_spread(method, pattern, scope, zeros):
    case = oracles.layer(11, 40, seed=1)
    case.weight[torch.rand(11, 40, generator=torch.Generator().manual_seed(0)) < zeros] = 0.0
    recipe = LayerRecipe(method=method, pattern=pattern, sparsity=0.51 if scope else None, scope=scope)
    inputs = InputStatistics(case.hessian, dtype=torch.float64)
    factor = inputs.factor(0.01)

    def solve(rows: slice, row_shards: RowShards) -> Solution:
        weight = case.weight[rows]
        budget = Budget.plan(11, 40, recipe)
        return registry.method(method).load()(
            Problem(
                weight,
                weight == 0,
                inputs,
                factor,
                recipe.parsed_pattern,
                budget,
                16,
                row_shards,
                scope=recipe.resolved_scope,
            )
        )

    alone = solve(slice(None), ALONE)
    parts = together(3, lambda p: solve(split(11, 3)[p.rank], p))
    assert torch.equal(torch.cat([part.removed for part in parts]), alone.removed)
    assert torch.allclose(torch.cat([part.weight for part in parts]), alone.weight, rtol=1e-9, atol=1e-12)


def test_alone_adds_nothing():
    counts = torch.tensor([3, 4])
    assert ALONE.sum_(counts) is counts
    assert ALONE.before(counts).tolist() == [0, 0]
    assert (ALONE.rank, ALONE.size) == (0, 1)
