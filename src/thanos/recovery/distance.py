"""The loss of recovery: KL(dense ‖ pruned) of the next-token distributions.

The logits of all tokens are never in memory at once. The decoders run once and give one hidden state per token. The heads then
run on chunks of tokens. The gradient with respect to a chunk's logits has a closed form, so it is propagated back through the
head immediately. Therefore the heads run once per token, and only one chunk of logits of each model exists at a time.

The dense model is fixed. If the sequences are the same in all epochs, its decoder's outputs can be computed once
(:mod:`~thanos.recovery.dense_outputs`). Then only its head runs in the training.

Shapes: B sequences, T tokens per sequence, d width of the hidden states (of each model), V entries of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from thanos.errors import ModelError
from thanos.model.attention import one_sequence_a_row

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHUNK_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Entries of one chunk's logits, by type of device: 16 MiB and 256 MiB in float32. About five such tensors exist at once."""

_COMPILED_CHUNK_LOGITS = 1 << 28
"""The same on CUDA with a compiled divergence, which keeps no tensor in float32: 512 MiB in bfloat16, three such tensors."""


Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""The type of :func:`divergence`."""


class SplitModel:
    """A causal language model whose decoder and head run separately.

    Both parts run inside the model's own ``forward``. So all operations of an architecture on the hidden states and the logits
    (a projection, a scale, a soft cap) are included.

    Args:
        model: the model.
        name: its name, for messages.

    Attributes:
        model: the model.

    Raises:
        ModelError: the decoder and the head cannot be separated.
    """

    def __init__(self, model: PreTrainedModel, name: str = "the model") -> None:
        decoder: Any = model.get_decoder()
        if decoder is None or decoder is model:
            raise ModelError(
                f"{name} ({type(model).__name__}) has no decoder that is separate from its head, which recovery needs; give a "
                "model whose get_decoder() returns one"
            )
        self.model, self._decoder = model, decoder
        self._kind: type[Any] | None = None

    def hidden(self, ids: Tensor) -> Tensor:
        """Return the decoder's outputs, (B·T, d), for token ids (B, T)."""
        kept: list[Any] = []

        def decode(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            kept.append(original(*args, **kwargs))
            # The head runs on a single token here; its result is not used.
            return self._outputs(type(kept[0]), kept[0][0][:, :1])

        with _replaced(self._decoder, decode), one_sequence_a_row():
            self.model(input_ids=ids, use_cache=False)
        self._kind = type(kept[0])
        return kept[0][0].flatten(0, 1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the head's logits, (n, V), for n rows of :meth:`hidden`, (n, d)."""
        assert self._kind is not None, "hidden() runs first"
        outputs = self._outputs(self._kind, hidden[None])
        ids = torch.zeros(1, 1, dtype=torch.long, device=hidden.device)
        with _replaced(self._decoder, lambda original, *args, **kwargs: outputs):
            return self.model(input_ids=ids, use_cache=False).logits[0]

    def head_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of all modules outside the decoder, including one tied to the decoder's embedding.

        They are looked up at each call, since a sharded model has other parameter objects inside its forward pass.
        """
        inside = set(self._decoder.modules())
        parameters = {
            id(p): p for m in self.model.modules() if m not in inside for p in m._parameters.values() if p is not None
        }
        return list(parameters.values())

    def release_decoder(self) -> None:
        """Free the decoder's weights, except those that the head shares. Afterwards only :meth:`logits` can run."""
        shared = {id(parameter) for parameter in self.head_parameters()}
        for module in self._decoder.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in shared:
                    module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    @property
    def decoder_bytes(self) -> int:
        """Bytes of the weights that :meth:`release_decoder` frees."""
        shared = {id(parameter) for parameter in self.head_parameters()}
        return sum(p.nbytes for p in self._decoder.parameters() if id(p) not in shared)

    @staticmethod
    def _outputs(kind: type[Any], hidden: Tensor) -> Any:
        return kind(last_hidden_state=hidden)


@contextmanager
def _replaced(decoder: nn.Module, replacement: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's ``forward`` by ``replacement``, which gets the original as its first argument."""
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

    Attributes:
        teacher: the dense model in two parts.
        outputs: the dense decoder's outputs for all sequences, (n, T, d); None to compute them in each pass.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, chunk: int | None = None) -> None:
        super().__init__()
        self.student = student
        self.teacher = SplitModel(teacher, "the dense model")
        self.outputs: Tensor | None = None
        self._split, self._chunk = SplitModel(student, "the pruned model"), chunk
        self._divergence, self._chunk_logits = divergence, _CHUNK_LOGITS
        super().train(False)

    def train(self, mode: bool = True) -> Distillation:
        """Stay in evaluation mode for both values of ``mode``."""
        del mode
        return self

    def compile_divergence(self, on: bool) -> None:
        """Compute the divergence by compiled code, on larger chunks on CUDA; or again as before."""
        self._divergence = torch.compile(divergence, dynamic=False) if on else divergence
        self._chunk_logits = _CHUNK_LOGITS | ({"cuda": _COMPILED_CHUNK_LOGITS} if on else {})

    def forward(self, ids: Tensor, numbers: Tensor | None = None) -> Tensor:
        """Return the mean KL divergence, in nats per token: a scalar, float32 (float64 if the models are float64).

        Args:
            ids: token ids, (B, T).
            numbers: indices of the sequences in ``outputs``, (B,); not used without ``outputs``.
        """
        # accelerate sets autocast only for a model that is not sharded. FSDP casts the pruned model alone, not the dense one.
        with torch.autocast("cuda", torch.bfloat16, enabled=ids.is_cuda):
            if self.outputs is None or numbers is None:
                with torch.no_grad():
                    dense = self.teacher.hidden(ids)
            else:
                dense = self.outputs[numbers].flatten(0, 1)
            hidden = self._split.hidden(ids)
            size = self._chunk or self._default_chunk(ids.device)
            sums = _Sums(self._split, self.teacher, size, dense, self._divergence)
            if torch.is_grad_enabled():
                return sums.with_gradient(hidden) / len(hidden)
            return sums.value(hidden) / len(hidden)

    def _default_chunk(self, device: torch.device) -> int:
        head: Any = self.student.get_output_embeddings()
        vocabulary = head.weight.shape[0] if head is not None else self.student.config.vocab_size
        most = self._chunk_logits.get(device.type, self._chunk_logits["cuda"]) // vocabulary
        # A power of two divides the usual numbers of tokens. So all chunks have one size, for which code is compiled once.
        return max(16, 1 << most.bit_length() >> 1)


class _Sums:
    """The sum of the divergences of n tokens, chunk by chunk.

    Args:
        student: the pruned model.
        teacher: the dense model.
        size: tokens of a chunk.
        dense: the dense decoder's outputs, (n, d of the dense model).
        divergence: :func:`divergence`, or the same compiled.
    """

    def __init__(
        self, student: SplitModel, teacher: SplitModel, size: int, dense: Tensor, divergence: Divergence
    ) -> None:
        self._student, self._teacher, self._size, self._dense = student, teacher, size, dense
        self._divergence = divergence

    def value(self, hidden: Tensor) -> Tensor:
        """Return the sum for the pruned decoder's outputs, (n, d of the pruned model), without a gradient."""
        total: Any = 0.0
        for rows, dense in zip(hidden.split(self._size), self._dense.split(self._size), strict=True):
            total = total + self._divergence(self._student.logits(rows), self._teacher.logits(dense))[0]
        return total

    def with_gradient(self, hidden: Tensor) -> Tensor:
        """Return the same sum as a function of ``hidden`` and of the head's parameters."""
        return _SumFunction.apply(self, hidden, *self._student.head_parameters())  # type: ignore[no-any-return]

    def gradients(self, hidden: Tensor, parameters: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor | None]]:
        """Return the sum, and its gradients for ``hidden`` and for the parameters (None where it does not depend on one)."""
        total: Any = 0.0
        hidden_gradient = torch.empty_like(hidden)
        sums: list[Tensor | None] = [None for _ in parameters]
        trained = [number for number, parameter in enumerate(parameters) if parameter.requires_grad]
        chunks = (tensor.split(self._size) for tensor in (hidden, self._dense, hidden_gradient))
        for rows, dense, rows_gradient in zip(*chunks, strict=True):
            leaf = rows.detach().requires_grad_(True)
            with torch.enable_grad():
                own = self._student.logits(leaf)
            part, at_logits = self._divergence(own.detach(), self._teacher.logits(dense))
            total = total + part
            first, *others = torch.autograd.grad(
                own, [leaf, *(parameters[number] for number in trained)], at_logits, allow_unused=True
            )
            rows_gradient.copy_(first)
            for number, gradient in zip(trained, others, strict=True):
                if gradient is not None:
                    before = sums[number]
                    sums[number] = _wide(gradient) if before is None else before.add_(gradient)
        return total, [hidden_gradient, *sums]


class _SumFunction(torch.autograd.Function):
    """The sum as an autograd function. Its gradients are computed in the forward pass, together with its value."""

    @staticmethod
    def forward(ctx: Any, sums: _Sums, hidden: Tensor, *parameters: Tensor) -> Tensor:
        total, ctx.gradients = sums.gradients(hidden, parameters)
        ctx.dtypes = [tensor.dtype for tensor in (hidden, *parameters)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> Any:  # type: ignore[override]
        gradients, ctx.gradients = ctx.gradients, None  # they are freed as soon as they are used
        scaled = (
            None if gradient is None else gradient.mul_(outer[0]).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return None, *scaled


def divergence(own: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ KL(p ‖ q) over n tokens, and its gradient with respect to the logits of q, which is q − p.

    Both are computed in float32 (float64 if ``own`` is); the gradient has the dtype of ``own``.

    Args:
        own: logits of q, (n, V).
        dense: logits of p, (n, V).
    """
    wide = torch.float64 if own.dtype == torch.float64 else torch.float32
    log_q = F.log_softmax(own, dim=-1, dtype=wide)
    log_p = F.log_softmax(dense, dim=-1, dtype=wide)
    p = log_p.exp()
    total = log_p.sub_(log_q).mul_(p).sum(-1).sum()
    return total, log_q.exp_().sub_(p).to(own.dtype)


def _wide(gradient: Tensor) -> Tensor:
    """Return a copy in float32, or in its own dtype if that is wider. The gradients of the other chunks are added to it."""
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
