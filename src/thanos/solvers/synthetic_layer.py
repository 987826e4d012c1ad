"""A random layer with correlated inputs, for timing solvers."""

from __future__ import annotations

import torch
from torch import Tensor

_TOKENS_AT_ONCE = 4096


def synthetic_layer(
    rows: int, columns: int, *, tokens: int, device: str, seed: int = 0, duplicates: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return a weight (rows, columns) and XᵀX (columns, columns), both float32, similar to a language model's layer.

    Inputs are x = s ∘ (z + A f). z is independent normal noise. f are 64 common normal factors. A is a normal mixing matrix;
    A f has half the variance of z, and correlates the columns. s is log-normal with σ = 1: most columns have similar scales,
    and a few are dozens of times larger. Weights are normal, with rows scaled log-normally with σ = 0.3.

    Args:
        rows: output rows.
        columns: input columns.
        tokens: number of inputs in XᵀX.
        device: device of the results.
        seed: seed of the random numbers.
        duplicates: if > 0, every second column is a copy of the column before it, plus noise of this relative size.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    factors = 64
    mixing, scales = normal(factors, columns) * (0.5 / factors) ** 0.5, torch.exp(normal(columns))
    hessian = torch.zeros(columns, columns, device=device)
    for first in range(0, tokens, _TOKENS_AT_ONCE):
        count = min(_TOKENS_AT_ONCE, tokens - first)
        inputs = normal(count, columns) + normal(count, factors) @ mixing
        if duplicates:
            inputs[:, 1::2] = inputs[:, : columns // 2 * 2 : 2] + duplicates * inputs[:, 1::2]
        inputs *= scales
        hessian.addmm_(inputs.T, inputs)
    return normal(rows, columns) * torch.exp(0.3 * normal(rows, 1)), hessian
