"""Running a model without its weights, to record which modules it calls and with which shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_TOKENS = 8


def some_ids(model: nn.Module, device: torch.device) -> Tensor:
    """Return a few token ids, (1, T), from the middle of the vocabulary: special tokens are at its ends."""
    find = getattr(model, "get_input_embeddings", None)
    table: Any = find() if callable(find) else None
    sizes = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    size = getattr(table, "num_embeddings", None) or max(sizes, default=_TOKENS)
    return (torch.arange(_TOKENS, device=device)[None] + size // 2) % size


@contextmanager
def weightless(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Replace every parameter by zeros with little memory, and every linear layer's output by zeros; undo both at the end."""
    from transformers.pytorch_utils import Conv1D

    before = [(module, dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    linear = [module for module in model.modules() if type(module).forward in (nn.Linear.forward, Conv1D.forward)]

    def zeros(module: nn.Module) -> Callable[[Tensor], Tensor]:
        outputs = getattr(module, "out_features", None) or getattr(module, "nf", 0)
        return lambda inputs: inputs.new_zeros(*inputs.shape[:-1], outputs)

    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        try:
            for module, parameters, buffers in before:
                for name, parameter in parameters.items():
                    if parameter is not None:
                        module._parameters[name] = nn.Parameter(_zeros(parameter, device), requires_grad=False)
                for name, buffer in buffers.items():
                    module._buffers[name] = None if buffer is None else buffer.to(device)
            for module in linear:
                module.forward = zeros(module)
            yield
        finally:
            for module in linear:
                vars(module).pop("forward", None)
            for module, parameters, buffers in before:
                module._parameters.update(parameters)
                module._buffers.update(buffers)


def _zeros(like: Tensor, device: torch.device) -> Tensor:
    """Return zeros in the shape and dtype of ``like``. A matrix is one number in memory, expanded.

    Other tensors are small, and kernels may need their real strides.
    """
    if like.dim() != 2:
        return torch.zeros(like.shape, dtype=like.dtype, device=device)
    return torch.zeros((), dtype=like.dtype, device=device).expand(like.shape)


@contextmanager
def replaced_forwards(
    blocks: Sequence[nn.Module], make: Callable[[int, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Replace the forward of each block by ``make(index, forward)`` inside the context."""
    # An instance attribute shadows the method, so the model can still read all other attributes of its blocks.
    for index, block in enumerate(blocks):
        block.forward = make(index, block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
