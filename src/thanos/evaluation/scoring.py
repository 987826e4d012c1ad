"""Losses of a model on windows of token ids, and its distance to the dense model on them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thanos.errors import DataError, NumericsError
from thanos.evaluation.windows import check_window
from thanos.events import Event
from thanos.model.attention import fast_attention
from thanos.model.bos import Bos
from thanos.model.loading import check_token_ids
from thanos.system.memory import free_device_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SCORED_POSITIONS = {"cpu": 256, "cuda": 1024}
"""Number of positions whose float32 log-probabilities are in memory at once, by type of device. 1024 positions × a vocabulary
of 256 k take 1 GiB."""

_BATCH_TOKENS = {"cuda": 16384}
"""Largest number of tokens per forward pass. On other devices one window at a time is as fast."""

_LOGITS = 2**31 - 1
"""Largest number of logits per forward pass, since some kernels index them with 32 bits: with more, torchao's int4 product on
CUDA ends with an illegal memory access."""

_LOGITS_FRACTION = 0.25
"""Fraction of the device's free memory that the logits of one batch may take, including the dense model's logits."""


@dataclass(kw_only=True, slots=True, eq=False)
class Reference:
    """The windows of a text and the dense model, for the evaluation of several models.

    Args:
        text: source of the text, as the report names it.
        windows: token ids, (windows, sequence_length) int64, on the CPU; see
            :func:`~thanos.evaluation.windows.cut_windows`.
        dense: name of the dense model; None without one.
        model: the dense model, loaded; None without one.
        keep_bytes: memory on the dense model's device for the inputs of its head, one vector per token, in bytes. If those of
            all windows fit, they are kept, and only the head runs again for the next model, with identical results. Otherwise
            the whole dense model runs again.
        bos: position of the beginning-of-text token in the windows.
        bos_ids: ids of the token, or of the several tokens, that stand there; they are not scored.
    """

    text: str
    windows: Tensor
    dense: str | None = None
    model: PreTrainedModel | None = None
    keep_bytes: int = 0
    bos: Bos = "text"
    bos_ids: tuple[int, ...] = ()
    # (index of the first window, number of windows) → the decoder's outputs, of this dense model only.
    _kept: dict[tuple[int, int], Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def sha256(self) -> str:
        """The hash of the windows' token ids (little-endian int64)."""
        return hashlib.sha256(self.windows.numpy().astype("<i8").tobytes()).hexdigest()

    @property
    def tokens(self) -> int:
        """Return the number of tokens that are scored: all but the first of each window, and but BOS."""
        count, length = self.windows.shape
        return sum(length - self.first_scored(index) for index in range(count))

    def first_scored(self, index: int) -> int:
        """Return the position of the first token that is scored in the window with this index."""
        begun = self.bos == "window" or (self.bos == "text" and index == 0)
        return max(1, len(self.bos_ids)) if begun else 1

    def check(self, model: PreTrainedModel) -> None:
        """Raise DataError if the windows are too long for ``model`` or the dense model, or contain ids outside a vocabulary."""
        for each in (model, self.model):
            if each is not None:
                check_window(self.windows.shape[1], each.config)
                check_token_ids(self.windows, each)

    def logits(self, first: int, ids: Tensor) -> Tensor | None:
        """Return the dense model's logits, (n, T, vocabulary); None without a dense model.

        ``ids``, (n, T), are the n windows from index ``first`` on.
        """
        if self.model is None:
            return None
        decoder, span = self.model.get_decoder(), (first, len(ids))
        if decoder is self.model:  # the decoder and the head cannot be separated
            return _logits(self.model, ids)
        with _watched(decoder, self._kept.get(span)) as outputs:
            logits = _logits(self.model, ids)
        if span not in self._kept and len(outputs) == 1:
            own = _bytes(outputs[0])
            # Entries of another batch size stay, so the sum can exceed the bytes of all windows.
            used = sum(_bytes(kept) for kept in self._kept.values())
            if own / len(ids) * len(self.windows) <= self.keep_bytes and used + own <= self.keep_bytes:
                self._kept[span] = outputs[0]
        return logits


@contextmanager
def _watched(decoder: nn.Module, kept: Any) -> Iterator[list[Any]]:
    """Record the outputs of ``decoder``. If ``kept`` is not None, the decoder returns it instead of computing outputs."""
    outputs: list[Any] = []
    original, own = decoder.forward, "forward" in vars(decoder)

    def forward(*args: Any, **kwargs: Any) -> Any:
        outputs.append(original(*args, **kwargs) if kept is None else kept)
        return outputs[-1]

    decoder.forward = forward
    try:
        yield outputs
    finally:
        if own:  # another library had replaced forward on this object
            decoder.forward = original
        else:
            del decoder.forward  # restores the method of the class


def _bytes(outputs: Any) -> float:
    """Return the bytes of a model's outputs; infinity if they are not exactly one tensor."""
    tensors = [value for value in outputs.values() if value is not None] if isinstance(outputs, dict) else []
    return tensors[0].nbytes if len(tensors) == 1 and isinstance(tensors[0], Tensor) else math.inf


@torch.inference_mode()
def score(model: PreTrainedModel, reference: Reference, emit: Callable[[Event], None]) -> list[float]:
    """Return four sums over all predicted tokens.

    They are the loss, the KL divergence, the number of positions with the same most probable token, and the loss of the dense
    model.
    """
    total, length = reference.windows.shape
    batch = _batch_size(model, reference)
    sums, done = torch.zeros(4, dtype=torch.float64), 0
    while done < total:
        ids = reference.windows[done : done + batch].to(model.device)
        window_sums = None
        try:
            window_sums = _score_batch(model, reference, done, ids)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        if window_sums is None:
            batch //= 2
            torch.cuda.empty_cache()  # outside the handler, whose traceback keeps the batch alive
            continue
        for index, window in enumerate(window_sums, start=done):
            if not bool(torch.isfinite(window).all()):
                raise NumericsError(_not_finite(window, index, model.dtype))
        sums, done = sums + window_sums.sum(0), done + len(ids)
        emit(Event(kind="progress", phase="evaluate", done=done, total=total, tokens=done * (length - 1)))
    return sums.tolist()


def _not_finite(sums: Tensor, index: int, dtype: torch.dtype) -> str:
    """Return the error message for a window whose sums, (4,), are not all finite."""
    wide = dtype in (torch.float32, torch.float64)
    remedy = "its weights may be damaged: download or save it again" if wide else "try --dtype float32"
    for which, loss in (("model", sums[0]), ("dense model", sums[3])):
        if not bool(loss.isfinite()):
            return f"the {which} gives NaN or infinite logits in window {index}; {remedy}"
    return (
        f"the KL divergence is infinite in window {index}: the model gives probability 0 (a logit of −∞) to a token that the "
        f"dense model gives a positive probability; {'' if wide else 'try --dtype float32, or '}leave out --dense"
    )


def _batch_size(model: PreTrainedModel, reference: Reference) -> int:
    """Return the number of windows per forward pass."""
    total, length = reference.windows.shape
    if model.device.type not in _BATCH_TOKENS:
        return 1
    logits = length * model.config.get_text_config().vocab_size
    window = logits * model.dtype.itemsize * (1 if reference.model is None else 2)
    fitting = int(_LOGITS_FRACTION * free_device_bytes(model.device)) // window
    return max(1, min(total, _BATCH_TOKENS[model.device.type] // length, fitting, _LOGITS // logits))


def _score_batch(model: PreTrainedModel, reference: Reference, first: int, ids: Tensor) -> Tensor:
    """Return the four sums of each window, (n, 4) float64 on the CPU; ``ids`` (n, T): the windows from index ``first`` on."""
    logits, dense = _logits(model, ids), reference.logits(first, ids)
    if dense is not None and dense.shape != logits.shape:
        raise DataError(
            f"the dense model has a vocabulary of {dense.shape[-1]} tokens, the model one of {logits.shape[-1]}, so they "
            "cannot be compared; give as --dense the model that this one was pruned from"
        )
    length, chunk = ids.shape[1], _SCORED_POSITIONS.get(ids.device.type, _SCORED_POSITIONS["cpu"])
    sums = torch.zeros(len(ids), 4, dtype=torch.float64, device=ids.device)
    for row in range(len(ids)):
        for start in range(reference.first_scored(first + row) - 1, length - 1, chunk):
            stop = min(start + chunk, length - 1)
            part = None if dense is None else dense[row, start:stop]
            sums[row] += _score_chunk(logits[row, start:stop], part, ids[row, start + 1 : stop + 1])
    return sums.cpu()


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with fast_attention(ids.device, model.dtype):
        return model(input_ids=ids, use_cache=False).logits


def _score_chunk(logits: Tensor, dense: Tensor | None, targets: Tensor) -> Tensor:
    """Return the four sums, (4,) float64, over P positions. Logits: (P, vocabulary); targets: token ids, (P,)."""
    log_p = logits.float().log_softmax(-1)
    loss = F.nll_loss(log_p, targets, reduction="none").double().sum()
    if dense is None:
        return torch.stack([loss, *torch.zeros_like(loss).expand(3)])
    log_q = dense.float().log_softmax(-1)
    terms = F.kl_div(log_p, log_q, log_target=True, reduction="none")
    terms = terms.masked_fill_(log_q.isneginf(), 0)  # q log(q/p) is 0 at q = 0, but is computed as 0 · ∞
    divergence = terms.sum(-1).double().sum()
    equal = (log_p.argmax(-1) == log_q.argmax(-1)).double().sum()
    dense_loss = F.nll_loss(log_q, targets, reduction="none").double().sum()
    return torch.stack([loss, divergence, equal, dense_loss])
