"""Bytes of a model's weights in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def weight_bytes(model: Any) -> tuple[int, int]:
    """Return the bytes of a model's parameters and buffers, and the bytes of them that one decoding step reads.

    Tied tensors count once. A quantised tensor counts as the tensors that it consists of.
    """
    by_address: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        by_address.update((part.data_ptr(), part.nbytes) for part in parts(tensor))
    total = sum(by_address.values())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    tied = head is not None and head in set(model.modules()) and _weight_pointer(head) == embedding.data_ptr()
    return total, total if tied else total - embedding.nbytes


def parts(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors with a tensor's data: the tensor itself, or those that a tensor subclass wraps."""
    if type(tensor) in (Tensor, torch.nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    wrapper: Any = tensor
    names, _ = wrapper.__tensor_flatten__()
    return [part for name in names for part in parts(getattr(tensor, name))]


def _weight_pointer(module: Any) -> int | None:
    own = dict(module.named_parameters(recurse=False)).get("weight")
    return None if own is None else own.data_ptr()
