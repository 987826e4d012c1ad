"""The derivative of a packed product with respect to its input and its bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def is_derived(*tensors: Tensor | None) -> bool:
    """Return whether a gradient with respect to one of the tensors is needed."""
    return torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in tensors)


class DerivedProduct(torch.autograd.Function):
    """The product as an autograd function, for calls that need a gradient of the input or the bias. The matrix is a constant.

    The operator itself has no derivative: that would cost each call without gradients a few microseconds.
    """

    @staticmethod
    def forward(x: Tensor, words: Tensor, offsets: Tensor | None, bias: Tensor | None, rows: int, n: int) -> Tensor:
        """Return the product; see :func:`~thanos.sparse.ops.packed_linear`."""
        return torch.ops.thanos.packed_linear.default(x, words, offsets, bias, rows, n)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the matrix, which is in memory anyway, but not the input."""
        del output
        x, words, offsets, _, _, ctx.n = inputs
        ctx.columns = x.shape[-1]
        ctx.save_for_backward(words, offsets)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator has no types)
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Return grad W for the input and the sum over the tokens for the bias; None for the others."""
        (grad,) = grads
        words, offsets = ctx.saved_tensors
        by_input, by_bias = None, None
        if ctx.needs_input_grad[0]:
            by_input = torch.ops.thanos.packed_input_gradient.default(grad, words, offsets, ctx.columns, ctx.n)
        if ctx.needs_input_grad[3]:
            by_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return by_input, None, None, by_bias, None, None
