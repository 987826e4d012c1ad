"""The loss of recovery: KL(dense ‖ pruned) of the next-token distributions.

The logits of all tokens are never in memory. The decoders run once and give one hidden state per token. The heads then run on
chunks of tokens, and again in the backward pass (activation checkpointing), so at most one chunk's logits of each model exist.

Shapes: B sequences, T tokens a sequence, d width of the hidden states (of each model), V entries of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from thanos.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHUNK_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Entries of one chunk's logits, by type of device: 16 MiB and 256 MiB in float32. About six such tensors exist at once."""


class SplitModel:
    """A causal language model whose decoder and head run apart.

    Both parts run inside the model's own ``forward``, so that all operations of an architecture on the hidden states and
    the logits (a projection, a scale, a soft cap) are included.

    Args:
        model: the model.
        name: its name, for messages.

    Raises:
        ModelError: the model has no decoder apart from its head.
    """

    def __init__(self, model: PreTrainedModel, name: str = "the model") -> None:
        decoder: Any = model.get_decoder()
        if decoder is None or decoder is model:
            raise ModelError(
                f"{name} ({type(model).__name__}) has no decoder apart from its head, which recovery needs; give a model of "
                "an architecture that transformers splits in this way"
            )
        self._model, self._decoder = model, decoder
        self._kind: type[Any] | None = None

    def hidden(self, ids: Tensor) -> Tensor:
        """Return the decoder's outputs, (B·T, d), for token ids (B, T)."""
        kept: list[Any] = []

        def decode(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            kept.append(original(*args, **kwargs))
            # The head runs on a single token here; its result is not used.
            return self._outputs(type(kept[0]), kept[0][0][:, :1])

        with _replaced(self._decoder, decode):
            self._model(input_ids=ids, use_cache=False)
        self._kind = type(kept[0])
        return kept[0][0].flatten(0, 1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the head's logits, (n, V), for n rows of :meth:`hidden`, (n, d)."""
        assert self._kind is not None, "hidden() runs first"
        given = self._outputs(self._kind, hidden[None])
        ids = torch.zeros(1, 1, dtype=torch.long, device=hidden.device)
        with _replaced(self._decoder, lambda original, *args, **kwargs: given):
            return self._model(input_ids=ids, use_cache=False).logits[0]

    @staticmethod
    def _outputs(kind: type[Any], hidden: Tensor) -> Any:
        return kind(last_hidden_state=hidden)


@contextmanager
def _replaced(decoder: nn.Module, replacement: Callable[..., Any]) -> Iterator[None]:
    """Let ``replacement`` run in place of a module's ``forward``; it gets the original as its first argument."""
    original, own = decoder.forward, "forward" in vars(decoder)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    decoder.forward = forward
    try:
        yield
    finally:
        if own:  # a library had replaced forward on this object
            decoder.forward = original
        else:
            del decoder.forward  # restores the method of the class


class Distillation(nn.Module):
    """The student with its loss. The teacher is not a submodule, so it is not trained, saved or sharded with the student.

    The student runs in evaluation mode, so without dropout: its outputs are compared with those of the dense model.

    Args:
        student: the pruned model.
        teacher: the dense model; same vocabulary, any other sizes.
        chunk: tokens whose logits are computed at once; None to choose by the vocabulary and the device.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, chunk: int | None = None) -> None:
        super().__init__()
        self.student = student
        self._models = SplitModel(student, "the pruned model"), SplitModel(teacher, "the dense model")
        self._chunk = chunk

    def train(self, mode: bool = True) -> Distillation:
        """Stay in evaluation mode for both values of ``mode``."""
        del mode
        return super().train(False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the mean KL divergence, in nats a token, for token ids (B, T): a scalar, float32 (float64 for such models)."""
        student, teacher = self._models
        with torch.no_grad():
            wanted = teacher.hidden(ids)
        hidden = student.hidden(ids)
        size = self._chunk or self._default_chunk(ids.device)
        total: Any = 0.0
        for rows, target in zip(hidden.split(size), wanted.split(size), strict=True):
            part = checkpoint(self._divergence, rows, target, use_reentrant=False, preserve_rng_state=False)
            total = total + part
        return total / len(hidden)

    def _divergence(self, hidden: Tensor, wanted: Tensor) -> Tensor:
        """Return the sum of the KL divergences of n tokens, from the two decoders' outputs (n, d)."""
        student, teacher = self._models
        with torch.no_grad():
            dense = F.log_softmax(_wide(teacher.logits(wanted)), dim=-1)
        own = F.log_softmax(_wide(student.logits(hidden)), dim=-1)
        return F.kl_div(own, dense, reduction="sum", log_target=True)

    def _default_chunk(self, device: torch.device) -> int:
        head: Any = self.student.get_output_embeddings()
        vocabulary = head.weight.shape[0] if head is not None else self.student.config.vocab_size
        return max(16, _CHUNK_LOGITS.get(device.type, _CHUNK_LOGITS["cuda"]) // vocabulary)


def _wide(logits: Tensor) -> Tensor:
    """Return logits in float32, in which the divergence is computed; float64 stays."""
    return logits if logits.dtype == torch.float64 else logits.float()
