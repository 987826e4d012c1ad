"""Attention on CUDA: grouped-query models in float32, and masks without a synchronisation.

In float32 on CUDA, torch has one kernel in which several heads share keys and values (``enable_gqa``). It holds all T × T
scores in memory. If the shared heads are repeated, which is a small copy, torch uses its memory-efficient kernel, which is
several times as fast.

transformers checks by the positions whether a row holds several sequences. The mask depends on the result, so the host waits
for the device in each forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_SEARCH = "find_packed_sequence_indices"
"""Name of the function of transformers that looks for several sequences in one row."""

_POSITIONAL = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
"""Arguments of torch's attention that a caller may give by position, in order."""


class RepeatedHeads(TorchFunctionMode):
    """While active, repeats shared keys and values for every head that reads them, in float32 attention."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function; repeat keys and values first if it is grouped-query attention in float32."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and kwargs.get("enable_gqa"):
            given = dict(zip(_POSITIONAL[: len(args)], args, strict=True)) | kwargs
            query, key, value = (given[name] for name in _POSITIONAL[:3])
            if query.dtype == torch.float32:
                repeated = {"key": _repeated(key, query), "value": _repeated(value, query), "enable_gqa": False}
                return func(**given | repeated)
        return func(*args, **kwargs)


def fast_attention(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Return a context for forward passes of a model of this dtype on this device; it changes only float32 on CUDA."""
    return RepeatedHeads() if device.type == "cuda" and dtype == torch.float32 else nullcontext()


@contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """While active, transformers treats each row of a batch as one sequence, as it does for the default positions."""
    from transformers import masking_utils

    module: Any = masking_utils
    original = getattr(module, _SEARCH, None)
    if original is None:  # a release without this search
        yield
        return
    setattr(module, _SEARCH, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(module, _SEARCH, original)


def _repeated(shared: Tensor, query: Tensor) -> Tensor:
    return shared.repeat_interleave(query.shape[-3] // shared.shape[-3], dim=-3)
