"""Slow, obviously correct float64 versions of the solvers, written from the formulas.

The code is easy to check by eye: explicit inverses, one row at a time, Python's sort. A Hessian is always XᵀX with X of shape
(tokens, columns).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

METHODS = ("thanos", "sparsegpt", "wanda", "magnitude", "admm")
COMPENSATING = ("thanos", "sparsegpt", "admm")
BLOCKWISE = ("thanos", "sparsegpt")


def used(method: str, **settings: Any) -> dict[str, Any]:
    """The settings with the method, without those settings that the method does not use."""
    others = ({"damping"} if method not in COMPENSATING else set()) | (
        {"block_size"} if method not in BLOCKWISE else set()
    )
    return {"method": method, **{name: value for name, value in settings.items() if name not in others}}


@dataclass(frozen=True)
class Layer:
    """A weight (rows, columns), its inputs X (tokens, columns), and XᵀX."""

    weight: Tensor
    inputs: Tensor
    hessian: Tensor


def layer(
    rows: int,
    columns: int,
    *,
    tokens: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    dead: Sequence[int] = (),
    duplicates: Sequence[tuple[int, int]] = (),
) -> Layer:
    """A random weight and correlated inputs whose columns differ in scale; (b, a) in ``duplicates`` copies column a to b."""
    generator = torch.Generator().manual_seed(1000 + seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens = 4 * columns + 8 if tokens is None else tokens
    mixing = torch.eye(columns, dtype=torch.float64) + normal(columns, columns) / math.sqrt(columns)
    inputs = (normal(tokens, columns) @ mixing) * torch.exp(0.5 * normal(columns))
    for copy, original in duplicates:
        inputs[:, copy] = inputs[:, original]
    for column in dead:
        inputs[:, column] = 0.0
    weight = normal(rows, columns) * torch.exp(0.3 * normal(rows, 1))
    return Layer(weight.to(dtype), inputs, (inputs.T @ inputs).to(dtype))


# --- the objective ---------------------------------------------------------------------------------------------------


def relative_error(weight: Tensor, pruned: Tensor, hessian: Tensor) -> float:
    """tr(Δ H Δᵀ) / tr(W H Wᵀ)."""
    weight, pruned, hessian = weight.double(), pruned.double(), hessian.double()
    delta = pruned - weight
    return (torch.trace(delta @ hessian @ delta.T) / torch.trace(weight @ hessian @ weight.T)).item()


def damped(hessian: Tensor, damping: float) -> Tensor:
    """H + λ·mean(diag H)·I; a zero on the diagonal becomes 1."""
    hessian = hessian.double()
    level = damping * hessian.diagonal().mean()
    result = hessian.clone()
    for j in range(hessian.shape[0]):
        result[j, j] = (1.0 if hessian[j, j] == 0 else hessian[j, j]) + level
    return result


# --- one set of weights at a time ------------------------------------------------------------------------------------


def formula_a(row: Tensor, remove: Tensor, hessian: Tensor) -> Tensor:
    """ŵ = w − w_P ((H⁻¹)_PP)⁻¹ (H⁻¹)_P: for one row; ``remove`` is its bool mask, ``hessian`` is damped already."""
    p = remove.nonzero().squeeze(1)
    if p.numel() == 0:
        return row.clone()
    inverse = torch.linalg.inv(hessian)
    result = row - row[p] @ torch.linalg.inv(inverse[p][:, p]) @ inverse[p, :]
    result[p] = 0.0
    return result


def formula_b(weight: Tensor, remove: Tensor, hessian: Tensor) -> Tensor:
    """Ŵ = W − W_:P ((H⁻¹)_PP)⁻¹ (H⁻¹)_P:; ``remove`` is a bool mask over columns."""
    return torch.stack([formula_a(row, remove, hessian) for row in weight])


def misprint_eq72(weight: Tensor, remove: Tensor, hessian: Tensor) -> Tensor:
    """The paper's Appendix G.4.2: (H_PP)⁻¹ H_P:."""
    p = remove.nonzero().squeeze(1)
    result = weight - weight[:, p] @ torch.linalg.inv(hessian[p][:, p]) @ hessian[p, :]
    result[:, p] = 0.0
    return result


def misprint_algorithm7(weight: Tensor, remove: Tensor, hessian: Tensor) -> Tensor:
    """The paper's Algorithm 7: (H⁻¹)_PP H_P:."""
    p = remove.nonzero().squeeze(1)
    result = weight - weight[:, p] @ torch.linalg.inv(hessian)[p][:, p] @ hessian[p, :]
    result[:, p] = 0.0
    return result


def least_squares(weight: Tensor, kept: Tensor, inputs: Tensor, damping: float) -> Tensor:
    """The best weight with the support ``kept``: per row, min ‖A (ŵ − w)‖ with AᵀA = XᵀX + λ·mean(diag)·I, without inverses."""
    weight, inputs = weight.double(), inputs.double()
    columns = inputs.shape[1]
    level = damping * inputs.square().sum(0).mean()
    a = torch.cat([inputs, level.sqrt() * torch.eye(columns, dtype=torch.float64)])
    result = torch.zeros_like(weight)
    for i, row in enumerate(weight):
        k = kept[i].nonzero().squeeze(1)
        if k.numel():
            solution = torch.linalg.lstsq(a[:, k], (a @ row)[:, None], driver="gelsd").solution
            result[i, k] = solution[:, 0]
    return result


def sequential_obs(weight: Tensor, remove: Tensor, hessian: Tensor) -> Tensor:
    """Optimal Brain Surgeon for a given mask: one column after the other, compensation only in the columns to its right."""
    weight = weight.double().clone()
    for j in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian[j:, j:])
        for i in range(weight.shape[0]):
            if remove[i, j]:
                weight[i, j:] -= weight[i, j] / inverse[0, 0] * inverse[0, :]
                weight[i, j] = 0.0
    return weight


def blockwise_obs(weight: Tensor, remove: Tensor, hessian: Tensor, block_size: int) -> Tensor:
    """Formula (A) for a given mask: for every row and block of columns, on the trailing Hessian."""
    weight = weight.double().clone()
    for start in range(0, weight.shape[1], block_size):
        width = min(block_size, weight.shape[1] - start)
        for i in range(weight.shape[0]):
            mask = torch.zeros(weight.shape[1] - start, dtype=torch.bool)
            mask[:width] = remove[i, start : start + width]
            weight[i, start:] = formula_a(weight[i, start:], mask, hessian[start:, start:])
    return weight


# --- which weights go ------------------------------------------------------------------------------------------------


def smallest(scores: Sequence[float], count: int) -> list[int]:
    """The indices of the ``count`` smallest scores; among equal scores the lower index comes first."""
    return sorted(range(len(scores)), key=lambda i: (scores[i], i))[:count]


def smallest_of(scores: Tensor, count: int) -> Tensor:
    """:func:`smallest` over a tensor in row-major order, as a bool mask."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[smallest(scores.reshape(-1).tolist(), count)] = True
    return mask.reshape(scores.shape)


def groups_of(scores: Tensor, n: int, m: int) -> Tensor:
    """The m − n smallest in every m consecutive entries of a row, as a bool mask."""
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for i in range(scores.shape[0]):
        for j in range(0, scores.shape[1], m):
            mask[i, j : j + m] = smallest_of(scores[i, j : j + m], m - n)
    return mask


def exact(number: float) -> Fraction:
    """The number as the decimal that the user typed: 0.29 is 29/100."""
    return Fraction(repr(number))


def weights_to_remove(sparsity: float, rows: int, columns: int) -> int:
    return math.floor(exact(sparsity) * rows * columns)


def columns_to_remove(sparsity: float, columns: int, outlier_rows: float) -> int:
    return math.ceil(exact(sparsity) * columns / (1 - exact(outlier_rows)))


def outlier_count(outlier_rows: float, rows: int) -> int:
    return math.ceil(exact(outlier_rows) * rows)


def outlier_indices(weight: Tensor, hessian: Tensor | None, outlier_rows: float) -> list[int]:
    """The ⌈α·c⌉ rows with the largest (W H Wᵀ)_ii, ascending."""
    count = outlier_count(outlier_rows, weight.shape[0])
    energies = [(row @ row if hessian is None else row @ hessian.double() @ row).item() for row in weight.double()]
    return sorted(smallest([-energy for energy in energies], count))


# --- whole methods ---------------------------------------------------------------------------------------------------


def prune(
    weight: Tensor,
    hessian: Tensor,
    *,
    method: str = "thanos",
    pattern: str = "unstructured",
    sparsity: float = 0.5,
    block_size: int = 128,
    damping: float = 0.01,
    outlier_rows: float = 0.0,
) -> tuple[Tensor, Tensor, list[int]]:
    """Return the pruned weight (float64), the mask of kept entries, and the indices of the rows left dense."""
    weight, hessian = weight.double(), hessian.double()
    rows, columns = weight.shape
    dense_rows = outlier_indices(weight, hessian, outlier_rows)
    others = [i for i in range(rows) if i not in dense_rows]
    task = _Task(
        weight[others],
        hessian,
        damped(hessian, damping),
        pattern,
        max(0, weights_to_remove(sparsity, rows, columns) - int((weight[dense_rows] == 0).sum())),
        columns_to_remove(sparsity, columns, outlier_rows),
        block_size,
    )
    solved, removed = solve(method, task)
    result, kept = weight.clone(), torch.ones(rows, columns, dtype=torch.bool)
    result[others], kept[others] = solved, ~removed
    return result, kept, dense_rows


def solve(method: str, task: _Task) -> tuple[Tensor, Tensor]:
    """Return the solved weight and the mask of the removed entries."""
    methods = {"thanos": _thanos, "sparsegpt": _sparsegpt, "wanda": _wanda, "magnitude": _magnitude, "admm": _admm}
    return methods[method](task)


@dataclass(frozen=True)
class _Task:
    weight: Tensor
    hessian: Tensor
    damped: Tensor
    pattern: str
    weights: int
    columns: int
    block_size: int
    was_zero: Tensor | None = None
    """Entries that must stay zero, where they are not those that are zero now."""

    @property
    def nm(self) -> tuple[int, int]:
        n, m = self.pattern.split(":")
        return int(n), int(m)

    @property
    def norms(self) -> Tensor:
        return self.hessian.diagonal().sqrt()

    @property
    def zeros(self) -> Tensor:
        return self.weight == 0 if self.was_zero is None else self.was_zero

    def first(self, scores: Tensor, start: int = 0) -> Tensor:
        """The scores with −1 for weights that were zero from the start, so that these are removed first."""
        return torch.where(self.zeros[:, start : start + scores.shape[1]], -1.0, scores)

    def whole_columns(self, scores: Tensor) -> Tensor:
        return smallest_of(scores, self.columns).expand(self.weight.shape)


def _thanos(task: _Task) -> tuple[Tensor, Tensor]:
    weight = task.weight.clone()
    if task.pattern == "columns":
        scores = weight.square().sum(0) * task.norms.square()
        removed = task.whole_columns(scores) | task.zeros
        rows = [formula_a(row, mask, task.damped) for row, mask in zip(weight, removed, strict=True)]
        return torch.stack(rows), removed
    removed = torch.zeros(weight.shape, dtype=torch.bool)
    left = max(task.weights, int(task.zeros.sum()))
    for start in range(0, weight.shape[1], task.block_size):
        stop = min(start + task.block_size, weight.shape[1])
        scores = task.first(weight[:, start:].abs() * task.norms[start:], start)
        if task.pattern == "unstructured":
            chosen = smallest_of(scores, left)[:, : stop - start]
            left -= int(chosen.sum())
        else:
            chosen = groups_of(scores[:, : stop - start], *task.nm) | task.zeros[:, start:stop]
        removed[:, start:stop] = chosen
        for i in range(weight.shape[0]):
            mask = torch.zeros(weight.shape[1] - start, dtype=torch.bool)
            mask[: stop - start] = chosen[i]
            weight[i, start:] = formula_a(weight[i, start:], mask, task.damped[start:, start:])
    return weight, removed


def _sparsegpt(task: _Task) -> tuple[Tensor, Tensor]:
    weight, (rows, columns) = task.weight.clone(), task.weight.shape
    # U_jj² is the first entry of the inverse of the trailing matrix.
    cost = torch.stack([torch.linalg.inv(task.damped[j:, j:])[0, 0] for j in range(columns)])
    alive = (task.hessian.diagonal() > 0).double()  # removing what never had an input costs nothing
    removed = task.zeros.clone()
    if task.pattern == "columns":
        removed |= task.whole_columns((weight.square() / cost * alive).sum(0))
    for j in range(columns):
        if task.pattern == "unstructured" and j % task.block_size == 0:
            assert not task.zeros.any(), "this oracle does not know how zeros share the budget"
            stop = min(j + task.block_size, columns)
            count = task.weights * stop // columns - int(removed.sum())
            removed[:, j:stop] = smallest_of(weight[:, j:stop].square() / cost[j:stop] * alive[j:stop], count)
        elif ":" in task.pattern and j % task.nm[1] == 0:
            n, m = task.nm
            scores = task.first(weight[:, j : j + m].square() / cost[j : j + m] * alive[j : j + m], j)
            removed[:, j : j + m] |= groups_of(scores, n, m)
        inverse = torch.linalg.inv(task.damped[j:, j:])
        for i in range(rows):
            if removed[i, j]:
                weight[i, j:] -= weight[i, j] / inverse[0, 0] * inverse[0, :]
                weight[i, j] = 0.0
    return weight, removed


def _wanda(task: _Task) -> tuple[Tensor, Tensor]:
    return _scored(task, task.weight.abs() * task.norms, per_row=True)


def _magnitude(task: _Task) -> tuple[Tensor, Tensor]:
    return _scored(task, task.weight.abs(), per_row=False)


def _scored(task: _Task, scores: Tensor, *, per_row: bool) -> tuple[Tensor, Tensor]:
    rows, columns = scores.shape
    if task.pattern == "columns":
        removed = task.whole_columns(scores.sum(0)) | task.zeros
    elif ":" in task.pattern:
        removed = groups_of(task.first(scores), *task.nm) | task.zeros
    elif not per_row:
        removed = smallest_of(task.first(scores), task.weights) | task.zeros
    else:
        scores = task.first(scores)
        counts = task.zeros.sum(1).tolist()
        ordered = [sorted(row) for row in scores.tolist()]
        while sum(counts) < task.weights:  # one more from whichever row has given least, the smallest score first
            row = min(range(rows), key=lambda i: (counts[i], ordered[i][counts[i]] if counts[i] < columns else 0.0, i))
            counts[row] += 1
        removed = torch.stack([smallest_of(row, counts[i]) for i, row in enumerate(scores)]) | task.zeros
    return torch.where(removed, 0.0, task.weight), removed


def _admm(task: _Task) -> tuple[Tensor, Tensor]:
    """ALPS' iteration, written out: B, P and V in the basis where the damped Hessian has a unit diagonal; then the optimum."""
    root = task.damped.diagonal().sqrt()
    unit = torch.diag(1 / root) @ task.damped @ torch.diag(1 / root)
    dense = task.weight * root * (task.hessian.diagonal() > 0)
    slow = task.pattern == "columns"

    def without(values: Tensor) -> Tensor:
        if task.pattern == "columns":
            removed = task.whole_columns(values.square().sum(0)) | task.zeros
        elif ":" in task.pattern:
            removed = groups_of(task.first(values.abs()), *task.nm) | task.zeros
        else:
            removed = smallest_of(task.first(values.abs()), task.weights) | task.zeros
        return removed

    initial = without(dense)
    if not task.weight[initial].any():
        return torch.where(initial, 0.0, task.weight), initial
    removed, start, restarts, moved = initial, 0.1, 0, False
    rho, p, v = start, torch.where(initial, 0.0, dense), 0.1 * torch.where(initial, dense, 0.0)
    for _ in range(100):
        before = removed
        for _ in range(3):
            b = (dense @ unit - v + rho * p) @ torch.linalg.inv(unit + rho * torch.eye(len(unit), dtype=unit.dtype))
            removed = without(b + v / rho)
            p = torch.where(removed, 0.0, b + v / rho)
            v = v + rho * (b - p)
        changed = int((removed != before).sum())
        if changed:
            share = changed / 2 / max(1, int((~removed).sum()))
            steps = (1.1, 1.07, 1.05) if slow else (1.3, 1.2, 1.1)
            rho *= steps[0] if share > 0.1 else steps[1] if share > 0.005 else steps[2]
            moved = True
        elif not moved and restarts < 4:
            restarts, start, removed = restarts + 1, start / 5, initial
            rho, p, v = start, torch.where(initial, 0.0, dense), start * torch.where(initial, dense, 0.0)
        else:
            break
    return best_for(task.weight, removed, task.damped), removed


def best_for(weight: Tensor, removed: Tensor, hessian: Tensor) -> Tensor:
    """The minimiser of (ŵ − w) H (ŵ − w)ᵀ for each row that is zero at ``removed``; ``hessian`` is damped already."""
    result = torch.zeros_like(weight)
    for i, row in enumerate(weight):
        k = (~removed[i]).nonzero().squeeze(1)
        result[i, k] = torch.linalg.solve(hessian[k][:, k], (hessian @ row)[k])
    return result
