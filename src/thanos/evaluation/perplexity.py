"""Perplexity by the field's convention, and the distance to the dense model."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thanos._version import __version__
from thanos.calibration.text import check_text_source, evaluation_rows
from thanos.errors import DataError, NumericsError, resource_errors
from thanos.evaluation.windows import check_window, cut_windows, decide_bos
from thanos.events import Event
from thanos.model.attention import fast_attention
from thanos.model.bos import Bos, check_bos
from thanos.model.loading import check_token_ids, load_model, parse_dtype
from thanos.model.source import find_local, resolve_model
from thanos.system.device import choose_device
from thanos.system.documents import Document
from thanos.system.event_stream import EventStream
from thanos.system.memory import free_device_bytes
from thanos.system.suggestions import near_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SCHEMA = 1

_SCORED_POSITIONS = {"cpu": 256, "cuda": 1024}
"""Number of positions whose float32 log-probabilities are held at once, by type of device. 1024 positions × a vocabulary of
256 k take 1 GiB."""

_BATCH_TOKENS = {"cuda": 16384}
"""Largest number of tokens per forward pass. Other devices take one window at a time, which fills them."""

_LOGITS_SHARE = 0.25
"""Fraction of the device's free memory that the logits of one batch may take, including the dense model's logits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation(Document):
    """The result of :func:`evaluate`; the attributes are the keys of ``--json``.

    Attributes:
        model: as the user named it.
        text: source of the text.
        text_sha256: hash of the scored text's token ids (little-endian int64).
        sequence_length: tokens per window.
        bos: position of the beginning-of-text token: ``window``, at the start of each window; ``text``, at the start of the
            text only; ``none``, nowhere, since the tokenizer adds none.
        windows: number of windows.
        tokens: number of tokens scored, sequence_length − 1 per window.
        perplexity: exp of the mean loss.
        mean_loss: nats per token.
        dense: the dense model, as the user named it; None without one.
        dense_perplexity: perplexity of the dense model on the same windows; None without a dense model.
        kl_divergence: mean KL(dense ‖ model) in nats per token; None without a dense model.
        top1_agreement: fraction of positions with the same most probable token; None without a dense model.
        seconds: seconds of scoring, without loading.
        tokens_per_second: ``tokens`` / ``seconds``.
        dtype: dtype in which the model ran.
        device: device on which the model ran.
        versions: versions of thanos, torch and transformers.
        schema: version of this format.
    """

    model: str
    text: str
    text_sha256: str
    sequence_length: int
    bos: Bos
    windows: int
    tokens: int
    perplexity: float
    mean_loss: float
    dense: str | None
    dense_perplexity: float | None
    kl_divergence: float | None
    top1_agreement: float | None
    seconds: float
    tokens_per_second: float
    dtype: str
    device: str
    versions: dict[str, str]
    schema: int = SCHEMA


@dataclass(kw_only=True, slots=True, eq=False)
class Reference:
    """The windows of a text and the dense model, made once for the evaluation of several models.

    Args:
        text: source of the text, as the report names it.
        windows: token ids, (windows, sequence_length) int64, on the CPU; see :func:`cut_windows`.
        dense: name of the dense model; None without one.
        model: the dense model, loaded; None without one.
        keep_bytes: bytes on the dense model's device for the inputs of its head, one vector per token. If the inputs for all
            windows fit, they are kept, and only the head runs again for the next model; the results have the same digits.
            Otherwise the whole dense model runs again.
        bos: position of the beginning-of-text token in the windows.
    """

    text: str
    windows: Tensor
    dense: str | None = None
    model: PreTrainedModel | None = None
    keep_bytes: int = 0
    bos: Bos = "text"
    # (index of the first window, number of windows) → the decoder's outputs, of this dense model only.
    _kept: dict[tuple[int, int], Any] = field(default_factory=dict, init=False, repr=False)

    def check(self, model: PreTrainedModel) -> None:
        """Refuse windows that the given model or the dense model cannot process.

        Raises:
            DataError: the windows are longer than a model's number of positions, or hold token ids that it does not embed.
        """
        for each in (model, self.model):
            if each is not None:
                check_window(self.windows.shape[1], each.config)
                check_token_ids(self.windows, each)

    def logits(self, first: int, ids: Tensor) -> Tensor | None:
        """Return the dense model's logits, (n, T, vocabulary), of ``ids``, the n windows (n, T) from index ``first`` on.

        Returns None without a dense model.
        """
        if self.model is None:
            return None
        decoder, place = self.model.get_decoder(), (first, len(ids))
        if decoder is self.model:  # the decoder and the head cannot be separated
            return _logits(self.model, ids)
        with _watched(decoder, self._kept.get(place)) as outputs:
            logits = _logits(self.model, ids)
        if place not in self._kept and len(outputs) == 1:
            own = _bytes(outputs[0])
            # Entries for another batch size stay, so what is held can be more than all windows need.
            held = sum(_bytes(kept) for kept in self._kept.values())
            if own / len(ids) * len(self.windows) <= self.keep_bytes and held + own <= self.keep_bytes:
                self._kept[place] = outputs[0]
        return logits


@contextmanager
def _watched(decoder: nn.Module, kept: Any) -> Iterator[list[Any]]:
    """Record the outputs of ``decoder``. If ``kept`` is not None, the decoder returns it and computes nothing."""
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


def evaluate(
    model: str | Path,
    *,
    text: str = "wikitext2",
    sequence_length: int = 2048,
    max_windows: int | None = None,
    dense: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    bos: str = "auto",
    on_event: Callable[[Event], None] | None = None,
    trust_remote_code: bool = False,
    reference: Reference | None = None,
    network: PreTrainedModel | None = None,
) -> Evaluation:
    """Measure perplexity and, with ``dense``, the distance to the dense model.

    Rows of the text are joined with a blank line and tokenised once, with the tokenizer's own special tokens. The ids are cut
    into windows that do not overlap; the remainder is left out. All tokens of a window except the first are predicted. The
    perplexity is the exponential of the mean loss over all windows. Log-probabilities are float32.

    If the tokenizer begins texts with a beginning-of-text token (BOS), BOS is at the start of the text only. If the dense model
    (without one, this model) needs it in each window, every window is BOS and sequence_length − 1 tokens of the text. BOS is
    never predicted.

    Args:
        model: a hub name, a local folder or a ``.gguf`` file.
        text: ``wikitext2``, ``c4``, ``pydoc`` or local files (text_files.py).
        sequence_length: tokens per window, at least 2.
        max_windows: largest number of windows, from the first on; None for all.
        dense: the model to compare with; must have the same vocabulary.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``.
        bos: position of BOS: ``window`` or ``text``; ``auto``: in each window if that lowers the perplexity of the first
            windows by 10 %.
        on_event: function called with events of progress.
        trust_remote_code: let transformers run Python code from a checkpoint.
        reference: windows and dense model that replace ``text``, ``sequence_length``, ``max_windows``, ``dense`` and ``bos``;
            the windows must come from this model's tokenizer.
        network: the model, if it is loaded already. It is scored on its own device and in its own dtype; ``device`` and
            ``dtype`` are ignored.

    Raises:
        UserError: the model, the text or the device cannot be used.
    """
    tell = EventStream(on_event)
    _check_options(text, sequence_length, max_windows, dtype)
    find_local(model, trust_remote_code=trust_remote_code, packed=True)
    dense = dense if reference is None else None
    if dense is not None:
        find_local(dense, trust_remote_code=trust_remote_code, packed=True, what="the dense model")
    where = choose_device(device) if network is None else network.device
    if reference is None:
        check_bos(bos)
        check_text_source(text, evaluation=True)
    source = resolve_model(model, trust_remote_code=trust_remote_code, packed=True)
    dense_source = None if dense is None else resolve_model(dense, trust_remote_code=trust_remote_code, packed=True)
    tokenizer, joined = None, ""
    if reference is None:
        for each in (source, dense_source):
            if each is not None:
                check_window(sequence_length, each.config())
        tokenizer = source.tokenizer()
        joined = _text(text, tokenizer, tell)
    length = sequence_length if reference is None else reference.windows.shape[1]
    with resource_errors(f"lower --sequence-length (now {length})", device=where):
        if network is None:
            network = load_model(source, dtype=dtype, device=where)
        if reference is None:
            assert tokenizer is not None
            other = None
            if dense_source is not None:
                other = load_model(dense_source, dtype=dtype, device=where)
            chosen = choose_bos(bos, joined, tokenizer, other or network, sequence_length, tell)
            windows = cut_windows(joined, tokenizer, network, text, sequence_length, max_windows, chosen)
            name = None if dense is None else str(dense)
            reference = Reference(text=text, windows=windows, dense=name, model=other, bos=chosen)
        reference.check(network)
        began = time.perf_counter()
        sums = _score(network, reference, tell)
    return _evaluation(str(model), network, reference, sums, time.perf_counter() - began)


def _evaluation(
    model: str, network: PreTrainedModel, reference: Reference, sums: list[float], seconds: float
) -> Evaluation:
    """Return the result for the sums of :func:`_score`."""
    import transformers

    where, compared = network.device, reference.model is not None
    count, length = reference.windows.shape
    tokens = count * (length - 1)
    loss = sums[0] / tokens
    return Evaluation(
        model=model,
        text=reference.text,
        text_sha256=hashlib.sha256(reference.windows.numpy().astype("<i8").tobytes()).hexdigest(),
        sequence_length=length,
        bos=reference.bos,
        windows=count,
        tokens=tokens,
        perplexity=_perplexity(loss),
        mean_loss=loss,
        dense=reference.dense,
        dense_perplexity=_perplexity(sums[3] / tokens) if compared else None,
        kl_divergence=sums[1] / tokens if compared else None,
        top1_agreement=sums[2] / tokens if compared else None,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        dtype=str(network.dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
        versions={"thanos": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    )


def _text(text: str, tokenizer: PreTrainedTokenizerBase, tell: Callable[[Event], None]) -> str:
    rows = evaluation_rows(text, tokenizer, lambda line: tell(Event(kind="note", phase="evaluate", message=line)))
    return "\n\n".join(rows)


def choose_bos(
    asked: str,
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    sequence_length: int,
    tell: Callable[[Event], None],
) -> Bos:
    """Return the position of BOS in the windows of a text, by the losses of ``model``.

    See :func:`~thanos.evaluation.windows.decide_bos`.

    Raises:
        DataError: ``asked`` is ``window`` and the tokenizer has no BOS, or the windows do not fit the model.
    """

    def mean_loss(windows: Tensor) -> float | None:
        tried = Reference(text="", windows=windows)
        tried.check(model)
        try:
            return _score(model, tried, lambda event: None)[0] / (len(windows) * (sequence_length - 1))
        except NumericsError:  # scoring the whole text reports it better
            return None

    check_window(sequence_length, model.config)
    return decide_bos(
        asked,
        text,
        tokenizer,
        sequence_length,
        mean_loss,
        lambda line: tell(Event(kind="note", phase="evaluate", message=line)),
    )


def _check_options(text: str, sequence_length: int, max_windows: int | None, dtype: str) -> None:
    if not isinstance(text, str):
        raise DataError(f"text must be a name or path as a string; got {type(text).__name__} {str(text)[:60]!r}")
    for name, value in (("sequence_length", sequence_length), ("max_windows", max_windows)):
        if isinstance(value, bool) or not isinstance(value, int | None):
            raise DataError(f"{name} must be a whole number; got {value!r}{near_whole(value)}")
    if sequence_length < 2:
        raise DataError(f"sequence_length must be at least 2, to predict one token; got {sequence_length}")
    if max_windows is not None and max_windows < 1:
        raise DataError(f"max_windows must be at least 1; got {max_windows}")
    if dtype != "auto":
        parse_dtype(dtype)


def _perplexity(mean_loss: float) -> float:
    return math.exp(mean_loss) if mean_loss < 700 else math.inf


@torch.inference_mode()
def _score(model: PreTrainedModel, reference: Reference, tell: Callable[[Event], None]) -> list[float]:
    """Return four sums over all predicted tokens: loss, KL divergence, equal most probable tokens, loss of the dense model."""
    total, length = reference.windows.shape
    batch = _batch_size(model, reference)
    sums, done = torch.zeros(4, dtype=torch.float64), 0
    while done < total:
        ids = reference.windows[done : done + batch].to(model.device)
        found = None
        try:
            found = _score_batch(model, reference, done, ids)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        if found is None:
            batch //= 2
            torch.cuda.empty_cache()  # outside the handler, whose traceback keeps the batch alive
            continue
        for index, window in enumerate(found, start=done):
            if not bool(torch.isfinite(window).all()):
                raise NumericsError(_complaint(window, index, model.dtype))
        sums, done = sums + found.sum(0), done + len(ids)
        tell(Event(kind="progress", phase="evaluate", done=done, total=total, tokens=done * (length - 1)))
    return sums.tolist()


def _complaint(sums: Tensor, index: int, dtype: torch.dtype) -> str:
    """Return the error message for a window with sums, (4,), that are not all finite."""
    wide = dtype in (torch.float32, torch.float64)
    remedy = "its weights may be damaged: download or save it again" if wide else "try --dtype float32"
    for which, loss in (("model", sums[0]), ("dense model", sums[3])):
        if not bool(loss.isfinite()):
            return f"the {which} gives NaN or infinite logits in window {index}; {remedy}"
    return (
        f"the KL divergence is infinite in window {index}: the model gives probability 0 (a logit of −∞) to a token that the "
        f"dense model holds possible; {'' if wide else 'try --dtype float32, or '}leave out --dense"
    )


def _batch_size(model: PreTrainedModel, reference: Reference) -> int:
    """Return the number of windows per forward pass."""
    total, length = reference.windows.shape
    if model.device.type not in _BATCH_TOKENS:
        return 1
    window = (
        length
        * model.config.get_text_config().vocab_size
        * model.dtype.itemsize
        * (1 if reference.model is None else 2)
    )
    room = int(_LOGITS_SHARE * free_device_bytes(model.device)) // window
    return max(1, min(total, _BATCH_TOKENS[model.device.type] // length, room))


def _score_batch(model: PreTrainedModel, reference: Reference, first: int, ids: Tensor) -> Tensor:
    """Return the four sums of each window, (n, 4) float64 on the CPU; ``ids`` (n, T): the windows from index ``first`` on."""
    logits, dense = _logits(model, ids), reference.logits(first, ids)
    if dense is not None and dense.shape != logits.shape:
        raise DataError(
            f"the dense model predicts {dense.shape[-1]} tokens, the model {logits.shape[-1]}, so they cannot be compared; "
            "give as --dense the model that this one was pruned from"
        )
    length, chunk = ids.shape[1], _SCORED_POSITIONS.get(ids.device.type, _SCORED_POSITIONS["cpu"])
    found = torch.zeros(len(ids), 4, dtype=torch.float64, device=ids.device)
    for row in range(len(ids)):
        for start in range(0, length - 1, chunk):
            stop = min(start + chunk, length - 1)
            part = None if dense is None else dense[row, start:stop]
            found[row] += _score_chunk(logits[row, start:stop], part, ids[row, start + 1 : stop + 1])
    return found.cpu()


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with fast_attention(ids.device, model.dtype):
        return model(input_ids=ids, use_cache=False).logits


def _score_chunk(logits: Tensor, dense: Tensor | None, targets: Tensor) -> Tensor:
    """Return the four sums, (4,) float64, over P positions: logits (P, vocabulary), target token ids (P,)."""
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
