"""The solve of one weight, step by step: an optional retarget, the method, any number of refinements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from thanos import registry
from thanos.errors import NumericsError, RecipeError
from thanos.patterns.base import Pattern
from thanos.patterns.budget import Budget
from thanos.recipe.layer import LayerRecipe
from thanos.solvers.hessian import InputStatistics
from thanos.solvers.layer_error import portions, relative_errors_and_zeros, squared_output_norms
from thanos.solvers.masking import without
from thanos.solvers.problem import Problem, Refine, Retarget, Solution
from thanos.solvers.pruned_weight import REMOVED, PrunedWeight
from thanos.solvers.row_shards import RowShards, row_range
from thanos.solvers.scaling import scaled_weight


class LayerSolve:
    """The solve of one weight; the arguments are those of :func:`~thanos.solvers.prune_layer.prune_layer`."""

    def __init__(
        self,
        weight: Tensor,
        inputs: InputStatistics | None,
        recipe: LayerRecipe,
        name: str,
        row_shards: RowShards,
        retarget: Retarget | None,
        refinements: Mapping[str, Refine],
    ) -> None:
        method = registry.method(recipe.method)
        if inputs is None and method.needs_inputs:
            raise RecipeError(f"method {recipe.method} needs the Hessian of the layer's inputs; got None")
        repairs = retarget is not None or bool(refinements)
        if repairs and (inputs is None or not inputs.measures):
            raise RecipeError("a retarget or a refinement needs the Hessian of the layer's inputs; got None")
        budget = Budget.plan(weight.shape[0], weight.shape[1], recipe)
        self.dense, zeros, self.unit = scaled_weight(weight, inputs, name)
        if inputs is not None and inputs.empty:
            # No input, or only zeros: no score can use them, and no change of the weight can be measured.
            retarget, refinements, repairs = None, {}, False
            if method.needs_inputs:  # The result reports the other method in `method`, never silently.
                method = registry.method_without_inputs(recipe.parsed_pattern)
                recipe = recipe.by(method.name)
        self.weight, self.inputs, self.recipe, self.name = weight, inputs, recipe, name
        self.row_shards, self.method = row_shards, method
        self.retarget, self.refinements = retarget, refinements
        self.own_rows = slice(*_bounds(len(self.dense), row_shards))
        norms = squared_output_norms(self.dense[self.own_rows], inputs)
        norms = row_shards.gather(norms, len(self.dense))
        self.norm = norms.sum()
        self.outliers, self.halved, self.parts = _split_rows(norms, budget, recipe.parsed_pattern)
        if zeros and len(self.outliers):
            # The zeros in outlier rows count towards the budget: the other rows lose that many fewer.
            budget = replace(budget, weights=max(0, budget.weights - int((self.dense[self.outliers] == 0).sum())))
        self.budget, self.zero_free = budget, zeros == 0
        factorises = inputs is not None and (method.needs_factor or repairs)
        self.factor = inputs.factor(recipe.damping) if inputs is not None and factorises else None
        self.targets: Tensor | None = None
        self.residuals: dict[str, Tensor] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the method and of the refinements."""
        return (self.recipe.method, *self.refinements)

    def prune(self) -> PrunedWeight:
        """Prune the weight, measure the errors and return the result."""
        inputs, factor, recipe = self.inputs, self.factor, self.recipe
        pruned, kept, steps = self._solve_parts()
        measured: list[Change] = [lambda rows: without(self.dense[rows], kept[rows])]
        if self.method.compensates or self.refinements or self.retarget:
            measured += [lambda rows, step=step: self._scaled(step[rows]) - self.dense[rows] for step in steps]
        changes = [self._squared_output_norm(change) for change in measured]
        errors, zeros = relative_errors_and_zeros(changes, self.norm, pruned, inputs)
        if zeros < (removed := pruned.numel() - int(kept.count_nonzero())):
            raise RecipeError(
                f"method {recipe.method} says that it removed {removed:,} entries of {self.name}, but its weight has only "
                f"{zeros:,} zeros; removed entries must be exact zeros (docs/add-a-method.md)"
            )
        if errors and errors[-1] is not None and not errors[-1] < float("inf"):
            raise NumericsError(f"pruning {self.name} gave NaN or infinity; raise damping (it is {recipe.damping:g})")
        if len(errors) == 1:  # nothing but the removed entries changed: the error after the method is the same
            errors *= 2
        return PrunedWeight(
            weight=pruned,
            zeros=zeros,
            kept=kept,
            outliers=self.outliers,
            halved=self.halved,
            method=recipe.method,
            errors=dict(zip((REMOVED, *self.names), errors, strict=True)) if errors else {},
            damping=None if factor is None else factor.damping,
            damping_reason="" if factor is None else factor.reason,
            condition=None if inputs is None or factor is None else inputs.condition(recipe.damping),
            residuals={name: value.item() for name, value in self.residuals.items()},
            target_changes=self._target_changes(measured, changes),
        )

    def _solve_parts(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the pruned weight, (c, b), the mask of the kept entries, (c, b), and the weight after each step.

        The weight after the last step is the pruned weight. Rows in none of the parts do not change. If one part holds all
        rows, its solution is the result, without a copy.
        """
        if len(self.parts) == 1 and len(self.parts[0][0]) == len(self.dense):
            steps, kept = self._solve(*self.parts[0], self.dense)
            return steps[-1], kept, steps
        steps = [self.weight.detach().clone() for _ in range(1 + len(self.refinements))]
        kept = torch.ones(self.weight.shape, dtype=torch.bool, device=self.weight.device)
        for rows, pattern in self.parts:
            solved, kept[rows] = self._solve(rows, pattern, self.dense[rows])
            for whole, part in zip(steps, solved, strict=True):
                whole[rows] = part
        return steps[-1], kept, steps

    def _solve(self, rows: Tensor, pattern: Pattern, part: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the rows ``part`` after each step, in the dtype of the weight, and the mask of the kept entries."""
        bounds = slice(*_bounds(len(part), self.row_shards))
        own = part[bounds]
        problem = Problem(
            weight=own,
            zeros=own == 0,
            inputs=self.inputs,
            factor=self.factor,
            pattern=pattern,
            budget=self.budget,
            block_size=self.recipe.resolved_block_size,
            row_shards=self.row_shards,
            all_rows=part,
            zero_free=self.zero_free,
            scope=self.recipe.resolved_scope,
            rows=rows[bounds],
            unit=self.unit,
        )
        if self.recipe.parsed_pattern.keeps_all:
            # No entry of this layer is removed, but the layer takes the weights of its dense target.
            problem = self._retargeted(problem, rows)
            solutions = [problem.without(problem.zeros)]
            for refine in self.refinements.values():
                solutions.append(refine(problem, solutions[-1]))
        elif self.recipe.resolved_sparsity <= 0:
            solutions = [Solution(own, problem.zeros)]
            solutions *= 1 + len(self.refinements)
        else:
            problem = self._retargeted(problem, rows)
            solutions = [_checked(self.method.load()(problem), problem, self.recipe.method)]
            for refine in self.refinements.values():
                solutions.append(refine(problem, solutions[-1]))
        for name, solution in zip(self.names, solutions, strict=True):
            self._note_residual(name, solution.residual, len(part))
        steps = [self._stored(solution.weight, len(part)) for solution in solutions]
        # If nothing was removed, copy: the result must not be the input weight itself.
        steps = [
            step.clone() if solution.weight is own else step for step, solution in zip(steps, solutions, strict=True)
        ]
        return steps, self.row_shards.gather(~solutions[-1].removed, len(part))

    def _retargeted(self, problem: Problem, rows: Tensor) -> Problem:
        if self.retarget is None:
            return problem
        before, problem = problem, self.retarget(problem)
        if problem is before:
            return problem
        if self.targets is None:
            self.targets = self.dense.clone()
        self.targets[rows] = self.row_shards.gather(problem.weight, len(rows))
        return problem

    def _note_residual(self, name: str, residual: Tensor | None, count: int) -> None:
        if residual is not None and count:
            largest = self.row_shards.gather(residual, count).max()
            self.residuals[name] = torch.maximum(largest, self.residuals.get(name, largest))

    def _target_changes(self, measured: list[Change], changes: list[Tensor]) -> dict[str, float | None]:
        """Return :attr:`PrunedWeight.target_changes`.

        With the target output Y, the shifted weight W̃ and Δ = Ŵ − W (docs/math.md, dense targets),
        ‖Y − X Ŵᵀ‖² − ‖Y − X Wᵀ‖² = tr(Δ XᵀX Δᵀ) − 2 tr((W̃ − W) H Δᵀ).
        """
        if self.targets is None or self.inputs is None or self.factor is None:
            return {}
        own = self.own_rows
        shift = self.targets[own] - self.dense[own]
        pull = torch.mm(shift, self.inputs.matrix).addcmul_(shift, self.inputs.shift(self.factor.damping))
        facts: list[Tensor] = []
        for number, (change, square) in enumerate(zip(measured, changes, strict=True)):
            inner = (pull * change(own)).sum(1, dtype=torch.float64)
            inner = inner if number else -inner  # the first is W − Ŵ, which makes no difference to the square
            facts.append(square - 2 * self.row_shards.gather(inner, len(self.dense)).sum())
        *values, norm = torch.stack([*facts, self.norm]).tolist()
        return {
            name: value / norm if norm > 0 else None for name, value in zip((REMOVED, *self.names), values, strict=True)
        }

    def _stored(self, solved: Tensor, count: int) -> Tensor:
        return self.row_shards.gather((solved if self.unit == 1 else solved * self.unit).to(self.weight.dtype), count)

    def _scaled(self, stored: Tensor) -> Tensor:
        part = stored.to(self.dense.dtype)
        return part if self.unit == 1 else part / self.unit

    def _squared_output_norm(self, change: Change) -> Tensor:
        norms = [squared_output_norms(change(rows), self.inputs) for rows in portions(self.own_rows, self.dense.device)]
        return self.row_shards.gather(torch.cat(norms), len(self.dense)).sum()


Change = Callable[[slice], Tensor]
"""The change of some rows of the weight, Ŵ − W up to its sign, in the dtype of the computation."""


def _checked(solution: Any, problem: Problem, method: str) -> Solution:
    """Return what a method returned, if it is a solution of the problem's shape.

    Raises:
        RecipeError: it is not, so the method is at fault.
    """
    shape = problem.weight.shape
    if not isinstance(solution, Solution):
        came = f"a {type(solution).__name__}"
    elif solution.weight.shape == shape == solution.removed.shape and solution.removed.dtype == torch.bool:
        return solution
    else:
        both = (f"{one.dtype} of shape {list(one.shape)}" for one in (solution.weight, solution.removed))
        came = " and ".join(both)
    raise RecipeError(
        f"method {method} must return a Solution with a weight and a bool mask of shape {list(shape)}; it returned {came} "
        "(docs/add-a-method.md)"
    )


def _bounds(count: int, row_shards: RowShards) -> tuple[int, int]:
    own = row_range(count, row_shards.rank, row_shards.size)
    return own.start, own.stop


def _split_rows(norms: Tensor, budget: Budget, pattern: Pattern) -> tuple[Tensor, Tensor, list[tuple[Tensor, Pattern]]]:
    """Split the rows by their squared output norms (c,); rows are ascending indices.

    Return the outlier rows, which stay dense; the halved rows, which keep half of the pattern's non-zeros; and for each
    problem to solve its rows and its pattern.
    """
    count, half = norms.numel(), budget.halved_rows
    if half or budget.outlier_rows:
        # Adding zero turns −0 into 0. A stable sort: among equal norms the row with the lower index comes first.
        order = (norms.clamp_min(0) + 0.0).argsort(stable=True)
        sizes = [half, count - half - budget.outlier_rows, budget.outlier_rows]
        halved, others, outliers = (rows.sort().values for rows in order.split(sizes))
    else:
        halved = outliers = norms.new_empty(0, dtype=torch.int64)
        others = torch.arange(count, device=norms.device)
    parts = [(others, pattern)]
    if half:
        parts.append((halved, pattern.halved()))
    return outliers, halved, [part for part in parts if len(part[0])]
