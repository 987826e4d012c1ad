"""The input and the output of a solver.

A method turns a problem into a solution. A refinement improves a solution. A retarget turns a problem into another problem.
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
from thanos.solvers.residual_mask import Residual, ResidualMask, RowResidualMask
from thanos.solvers.row_selection import even_rows_mask, nm_mask, row_budgets
from thanos.solvers.row_shards import ALONE, RowShards
from thanos.solvers.selection import KernelSearch, smallest_mask


@dataclass(frozen=True)
class Problem:
    """The rows of one weight that may be pruned, with the statistics of their inputs.

    The rows may be split over processes. ``weight`` holds the rows of this process. The functions that count or select do so
    over the rows of all processes.

    Attributes:
        weight: W without its outlier rows, (c, b), float32 or float64. Methods must not modify it.
        zeros: mask of the entries that are zero already and must stay so, (c, b) bool.
        inputs: the statistics of the layer's inputs; None only for methods that need none.
        factor: the factor of the damped Hessian; None for methods that need none.
        pattern: the sparsity pattern: which sets of weights may be removed.
        budget: how many weights are removed, from all rows together.
        block_size: number of input columns handled together.
        row_shards: the processes that hold the rows of the same weight.
        all_rows: the rows of all processes, (c', b); None if ``weight`` holds all rows.
        zero_free: True if ``zeros`` is known to have no True entry. Otherwise ``zeros`` is read when it is first needed.
        scope: ``layer``: one budget for all rows; ``row``: a budget for each row, and two of them differ by at most one entry.
            It is used only if the pattern may remove any entries.
        rows: indices of the rows of ``weight`` in the whole weight of the layer, (c,); None if they are all rows.
        unit: the power of two by which the layer's weight was divided.
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
    scope: str = "layer"
    rows: Tensor | None = None
    unit: float = 1.0

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yield the column ranges [j1, j2) from left to right; the last may be narrower."""
        columns = self.weight.shape[1]
        for start in range(0, columns, self.block_size):
            yield start, min(start + self.block_size, columns)

    # --- statistics of the inputs -------------------------------------------------------------------------------------

    @property
    def upper(self) -> Tensor:
        """U, the factor, (b, b), in the dtype of ``weight``: (damped H)⁻¹ = UᵀU."""
        assert self.factor is not None
        return self.factor.upper

    @property
    def shift(self) -> Tensor:
        """The diagonal of the damped Hessian minus that of ``inputs.matrix``, (b,)."""
        assert self.inputs is not None
        assert self.factor is not None
        return self.inputs.shift(self.factor.damping)

    @property
    def norms(self) -> Tensor:
        """The norms ‖X_j‖₂ of the input columns up to a common factor, (b,)."""
        assert self.inputs is not None
        return self.inputs.norms

    # --- selection of the entries to remove ---------------------------------------------------------------------------

    @property
    def by_row(self) -> bool:
        """Whether every row has a budget of its own."""
        return self.scope == "row"

    def choose(self, score: Callable[[Tensor], Tensor]) -> Tensor:
        """Choose the whole mask at once, by pattern and scope: the entries, or columns, with the smallest scores.

        Args:
            score: maps rows of the weight, (any, b), to the scores of their entries, at least 0. The score of a column is the
                sum of its entries' scores.

        Returns:
            The mask, (c, b) bool, True where an entry is removed; ``zeros`` included.
        """
        if self.pattern.whole_columns:
            return self.choose_columns(self.column_sums(score)) | self.zeros
        return self.choose_by(score(self.weight))

    def choose_by(self, scores: Tensor) -> Tensor:
        """Choose the whole mask by given scores, which need not be a function of the weight; otherwise like :meth:`choose`.

        Args:
            scores: scores of the entries of ``weight``, (c, b), at least 0; overwritten.
        """
        if self.pattern.whole_columns:
            count = len(scores) if self.all_rows is None else len(self.all_rows)
            # All rows, not the sums of each process: then the result has the bits of a single process.
            return self.choose_columns(self.row_shards.gather(scores, count).sum(0)) | self.zeros
        return self.pattern.mask(self, self.mark_zeros(scores), by_row=self.by_row) | self.zeros

    def choose_columns(self, scores: Tensor) -> Tensor:
        """Return the mask, (c, b) bool, of whole columns by their scores, (b,), for a pattern with ``whole_columns``."""
        return self.pattern.mask(self, scores).expand(self.weight.shape[0], -1).clone()

    def column_sums(self, values: Callable[[Tensor], Tensor]) -> Tensor:
        """Return ``values`` of the rows of all processes, summed over the rows, (b,); the same bits on every process."""
        return values(self.weight if self.all_rows is None else self.all_rows).sum(0)

    def without(self, removed: Tensor) -> Solution:
        """Return the solution that sets the entries ``removed``, (c, b) bool, to zero and changes no others."""
        return Solution(without(self.weight, removed), removed)

    @cached_property
    def some_zeros(self) -> Tensor | None:
        """``zeros``, or None if no entry is True."""
        return None if self.zero_free or not bool(self.zeros.any()) else self.zeros

    def mark_zeros(self, scores: Tensor, start: int = 0) -> Tensor:
        """Set the scores at ``zeros`` to −1, below all others, in place; return ``scores``.

        The first column of ``scores`` is column ``start`` of the weight.
        """
        zeros = self.some_zeros
        return scores if zeros is None else scores.masked_fill_(zeros[:, start : start + scores.shape[1]], -1.0)

    # --- functions over the rows of all processes ---------------------------------------------------------------------

    def total(self, counts: Tensor) -> Tensor:
        """Replace an integer tensor, in place, by its sum over the processes that hold the rows; return it."""
        return self.row_shards.sum_(counts)

    def smallest(self, scores: Tensor, count: int | Tensor) -> Tensor:
        """Return a mask (c, b) with ``count`` True over all rows, at the smallest of the scores (c, b)."""
        return smallest_mask(scores, count, self.row_shards)

    def smallest_of_each_row(self, scores: Tensor, count: int) -> Tensor:
        """Return a mask with ``count`` True over all rows, as even as possible; see :func:`even_rows_mask`."""
        return even_rows_mask(scores, count, self.row_shards)

    def smallest_of_each_group(self, scores: Tensor, count: int, group: int) -> Tensor:
        """Return a mask with ``count`` True in every ``group`` consecutive entries of a row."""
        return nm_mask(scores, group - count, group)

    def smallest_columns(self, scores: Tensor, count: int) -> Tensor:
        """Return a mask with ``count`` True, at the smallest scores (b,), which are the same on every process."""
        return smallest_mask(scores, count)

    def kernel_search(self) -> KernelSearch:
        """Return a search for the k smallest entries of all rows, on a GPU."""
        return KernelSearch(self.row_shards)

    def row_budgets(self, scores: Tensor) -> Tensor:
        """Return the number of entries that each row loses, (c,), by the scores (c, b), if every row has its own budget."""
        return row_budgets(scores, self.budget.weights, self.row_shards)

    def residual_mask(self) -> Residual:
        """Return Thanos' selection of the smallest |W_ij|·‖X_j‖₂ among all remaining columns, for the whole budget."""
        if self.by_row:
            scores = self.mark_zeros(self.weight.abs().mul_(self.norms))
            return RowResidualMask(self.norms, self.some_zeros, self.row_budgets(scores))
        zeros = self.total(self.zeros.count_nonzero())
        # The budget is a tensor on the device, so that no block waits until the host has read how many entries are removed
        # already.
        return ResidualMask(self.norms, self.some_zeros, zeros.clamp_min(self.budget.weights), self.row_shards)

    def row_solver(self, *, defer_convergence_check: bool = False) -> RowSolver:
        """Return a solver for linear systems whose support differs from row to row."""
        return RowSolver(row_shards=self.row_shards, defer_convergence_check=defer_convergence_check)


@dataclass(frozen=True, slots=True)
class Solution:
    """A problem's solution.

    Attributes:
        weight: the pruned weight, (c, b), in the dtype of the problem's weight; removed entries are exact zeros.
        removed: mask of the removed entries, (c, b) bool, the problem's ``zeros`` included.
        residual: relative residual of each row's system of equations for the remaining weights, (c,); None if the solver solves
            no such systems, or solves them to rounding.
    """

    weight: Tensor
    removed: Tensor
    residual: Tensor | None = None


Method = Callable[[Problem], Solution]
Refine = Callable[[Problem, Solution], Solution]
Retarget = Callable[[Problem], Problem]
