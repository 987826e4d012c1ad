"""The derivative of a packed product by its input and its bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def is_derived(*tensors: Tensor | None) -> bool:
    """Return whether a gradient by one of the tensors is wanted."""
    return torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in tensors)


class DerivedProduct(torch.autograd.Function):
    """The product where a gradient by the input or the bias is wanted, to which the matrix is a constant.

    A function of autograd only here: as a part of the operator it would cost each call without gradients some microseconds.
    """

    @staticmethod
    def forward(x: Tensor, words: Tensor, offsets: Tensor | None, bias: Tensor | None, rows: int, n: int) -> Tensor:
        """Return the product; see :func:`~thanos.sparse.ops.packed_linear`."""
        return torch.ops.thanos.packed_linear.default(x, words, offsets, bias, rows, n)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the matrix, which is there anyway, and no input."""
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
