"""Attention of grouped-query models in float32 on CUDA.

There, torch's only kernel in which several heads share keys and values (``enable_gqa``) holds all T × T scores in memory. With
the shared heads repeated, a small copy, the memory-efficient kernel applies, which is several times as fast.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_POSITIONAL = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
"""Arguments of torch's attention, any of which may be given by position."""


class RepeatedHeads(TorchFunctionMode):
    """While active, float32 attention with shared keys and values gets a copy of them for every head that reads them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Hand every call through; those of grouped-query attention with keys and values repeated."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and kwargs.get("enable_gqa"):
            given = dict(zip(_POSITIONAL[: len(args)], args, strict=True)) | kwargs
            query, key, value = (given[name] for name in _POSITIONAL[:3])
            if query.dtype == torch.float32:
                repeated = {"key": _repeated(key, query), "value": _repeated(value, query), "enable_gqa": False}
                return func(**given | repeated)
        return func(*args, **kwargs)


def fast_attention(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Return a context for forward passes of a model of this dtype on this device; it does nothing where it would not help."""
    return RepeatedHeads() if device.type == "cuda" and dtype == torch.float32 else nullcontext()


def _repeated(shared: Tensor, query: Tensor) -> Tensor:
    return shared.repeat_interleave(query.shape[-3] // shared.shape[-3], dim=-3)
