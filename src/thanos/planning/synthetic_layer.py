"""A random layer with correlated inputs, to time solvers on."""

from __future__ import annotations

import torch
from torch import Tensor

_TOKENS_AT_ONCE = 4096


def synthetic_layer(
    rows: int, columns: int, *, tokens: int, device: str, seed: int = 0, duplicates: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return a weight (rows, columns) and XᵀX (columns, columns), float32, in the likeness of a language model's layer.

    Inputs are x = s ∘ (z + A f): z independent normal, f 64 common normal factors mixed by a normal A of half z's variance in
    all, which correlates the columns, and s log-normal with σ = 1: most columns are alike, a few dozens of times larger.
    Weights are normal, rows scaled log-normally with σ = 0.3. ``duplicates`` > 0 makes every second column a copy of the one
    before it, up to that much noise.
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
