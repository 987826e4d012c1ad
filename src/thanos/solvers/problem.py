"""What a solver gets and gives.

A method makes a solution of a problem, a refinement a better solution, a retarget another problem.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from thanos.patterns.base import Pattern
from thanos.patterns.budget import Budget
from thanos.solvers.hessian import Factor, InputStatistics
from thanos.solvers.masked_cg import RowSolver
from thanos.solvers.masking import without
from thanos.solvers.row_shards import ALONE, RowShards
from thanos.solvers.selection import (
    KernelSearch,
    ResidualMask,
    even_rows_mask,
    nm_mask,
    smallest_mask,
)


@dataclass(frozen=True)
class Problem:
    """The rows of one weight that may be pruned, and what is known about their inputs.

    The rows may be spread over processes: ``weight`` holds this process's, and what counts or selects counts over all of them.

    Attributes:
        weight: W without its outlier rows, (c, b), float32 or float64. Methods must not modify it.
        zeros: entries that were zero before and must stay so, (c, b) bool.
        inputs: the statistics of the layer's inputs; None only for methods that need none.
        factor: the factorised damped Hessian; None for methods that need none.
        pattern: which sets of weights may go.
        budget: how many, of all rows together.
        block_size: input columns handled together.
        row_shards: the processes that hold the other rows.
        all_rows: W with their rows too, (c', b); None if ``weight`` is all.
        zero_free: ``zeros`` is known to hold none; else it is read when it is first needed.
    """

    weight: Tensor
    zeros: Tensor
    inputs: InputStatistics | None
    factor: Factor | None
    pattern: Pattern
    budget: Budget
    block_size: int
    row_shards: RowShards = ALONE
    all_rows: Tensor | None = None
    zero_free: bool = False

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yield the column ranges [j1, j2) from left to right; the last may be narrower."""
        columns = self.weight.shape[1]
        for start in range(0, columns, self.block_size):
            yield start, min(start + self.block_size, columns)

    # --- what is known of the inputs ----------------------------------------------------------------------------------

    @property
    def upper(self) -> Tensor:
        """U of the factor, (b, b), in the dtype of ``weight``: (damped H)⁻¹ = UᵀU."""
        assert self.factor is not None
        return self.factor.upper

    @property
    def norms(self) -> Tensor:
        """‖X_j‖₂ up to a common factor, (b,)."""
        assert self.inputs is not None
        return self.inputs.norms

    # --- choosing what goes -------------------------------------------------------------------------------------------

    def choose(self, score: Callable[[Tensor], Tensor], *, by_row: bool = False) -> Tensor:
        """Choose by the pattern, once, what goes: the entries, or columns, with the smallest scores, and what is zero already.

        Args:
            score: rows of the weight, (any, b), → their scores, at least 0; a column's score is the sum of its entries'.
            by_row: compare scores within a row only, where the pattern leaves that open.

        Returns:
            (c, b) bool, True where an entry goes.
        """
        if self.pattern.whole_columns:
            return self.choose_columns(self.column_sums(score)) | self.zeros
        return self.pattern.mask(self, self.mark_zeros(score(self.weight)), by_row=by_row) | self.zeros

    def choose_columns(self, scores: Tensor) -> Tensor:
        """Choose whole columns by their scores, (b,), for a pattern with ``whole_columns``; (c, b) bool."""
        return self.pattern.mask(self, scores).expand(self.weight.shape[0], -1).clone()

    def column_sums(self, values: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the sums over all rows, (b,), of a function of the weight's rows; the same bits on every process."""
        return values(self.weight if self.all_rows is None else self.all_rows).sum(0)

    def without(self, removed: Tensor) -> Solution:
        """Return the solution that sets entries to zero, (c, b) bool, and changes nothing else."""
        return Solution(without(self.weight, removed), removed)

    @cached_property
    def some_zeros(self) -> Tensor | None:
        """``zeros``, or None if there are none."""
        return None if self.zero_free or not bool(self.zeros.any()) else self.zeros

    def mark_zeros(self, scores: Tensor, start: int = 0) -> Tensor:
        """Give what was zero from the start the score −1, below all others; ``scores`` covers the columns from ``start``."""
        zeros = self.some_zeros
        return scores if zeros is None else scores.masked_fill_(zeros[:, start : start + scores.shape[1]], -1.0)

    # --- over all rows ------------------------------------------------------------------------------------------------

    def total(self, counts: Tensor) -> Tensor:
        """Replace an integer tensor, in place, by its sum over the processes that hold the rows; return it."""
        return self.row_shards.sum_(counts)

    def smallest(self, scores: Tensor, count: int | Tensor) -> Tensor:
        """Return a mask with ``count`` True, at the smallest of all rows' scores (c, b)."""
        return smallest_mask(scores, count, self.row_shards)

    def smallest_of_each_row(self, scores: Tensor, count: int) -> Tensor:
        """Return a mask with ``count`` True over all rows, the same number in every row up to one."""
        return even_rows_mask(scores, count, self.row_shards)

    def smallest_of_each_group(self, scores: Tensor, count: int, group: int) -> Tensor:
        """Return a mask with ``count`` True in every ``group`` consecutive entries of a row."""
        return nm_mask(scores, group - count, group)

    def smallest_columns(self, scores: Tensor, count: int) -> Tensor:
        """Return a mask with ``count`` True, at the smallest scores (b,), which are the same on every process."""
        return smallest_mask(scores, count)

    def kernel_search(self) -> KernelSearch:
        """Return a search for the k smallest of all rows on a GPU."""
        return KernelSearch(self.row_shards)

    def residual_mask(self) -> ResidualMask:
        """Return Thanos' mask of the smallest |W_ij|·‖X_j‖₂ of everything that is left, for the whole budget."""
        zeros = self.total(self.zeros.count_nonzero())
        # Counted down on the device, so that no block waits for the host to learn what the one before it took.
        return ResidualMask(self.norms, self.some_zeros, zeros.clamp_min(self.budget.weights), self.row_shards)

    def row_solver(self, *, defer_convergence_check: bool = False) -> RowSolver:
        """Return a solver for systems with another support in every row."""
        return RowSolver(row_shards=self.row_shards, defer_convergence_check=defer_convergence_check)


@dataclass(frozen=True, slots=True)
class Solution:
    """A problem's solution.

    Attributes:
        weight: (c, b), in the dtype of the problem's; entries that are removed are exact zeros.
        removed: (c, b) bool, the problem's ``zeros`` included.
    """

    weight: Tensor
    removed: Tensor


Method = Callable[[Problem], Solution]
Refine = Callable[[Problem, Solution], Solution]
Retarget = Callable[[Problem], Problem]
