"""What pruning cost: perplexity by the field's convention, and the distance to the dense model."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from thanos._version import __version__
from thanos.errors import DataError, NumericsError, ResourceError
from thanos.eventlog import EventStream
from thanos.events import Event
from thanos.memory import is_out_of_memory
from thanos.pretrained import check_token_ids, choose_device, context_length, load_model, resolve_model
from thanos.text import evaluation_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SCHEMA = 1

_CHUNK = 256
"""Positions whose log-probabilities are in float32 at once; 256 × a vocabulary of 256 k is 0.25 GiB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The result of :func:`evaluate`; the attributes are the keys of ``--json``.

    Attributes:
        model: as the user named it.
        text: the source of the text.
        text_sha256: hash of the scored text's token ids (little-endian int64).
        sequence_length: tokens per window.
        windows: number of windows.
        tokens: number of tokens scored, sequence_length − 1 per window.
        perplexity: exp of the mean loss.
        mean_loss: nats per token.
        dense: the dense model, as the user named it; None without one.
        dense_perplexity: its perplexity on the same windows; None without one.
        kl_divergence: mean KL(dense ‖ model) in nats per token; None without a dense model.
        top1_agreement: share of positions with the same most probable token; None without a dense model.
        seconds: of scoring, without loading.
        tokens_per_second: scored tokens by those seconds.
        dtype: in which the model ran.
        device: on which it ran.
        versions: of thanos, torch and transformers.
        schema: version of this format.
    """

    model: str
    text: str
    text_sha256: str
    sequence_length: int
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

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, in the order of the attributes, ``schema`` first; infinity becomes None."""
        values = {name: None if value in (math.inf, -math.inf) else value for name, value in asdict(self).items()}
        return {"schema": values.pop("schema"), **values}


@dataclass(kw_only=True, slots=True, eq=False)
class Reference:
    """What several models are measured by: the windows of a text, and the dense model to compare with, both made once.

    Args:
        text: the source of the text, as it is to be reported.
        windows: (windows, sequence_length) int64, on the CPU; see :func:`cut_windows`.
        dense: name of the dense model; None without one.
        model: that model; None without one.
        keep_bytes: room on the model's device for its logits. They are kept as the model gave them if those of all windows
            fit, which changes no digit of the result; else they are computed anew for every model that is compared.
    """

    text: str
    windows: Tensor
    dense: str | None = None
    model: PreTrainedModel | None = None
    keep_bytes: int = 0
    _kept: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def check(self, model: PreTrainedModel) -> None:
        """Refuse windows that a model, or the dense one, cannot take.

        Raises:
            DataError: the windows are longer than its positions, or hold tokens that it does not embed.
        """
        for each in (model, self.model):
            if each is not None:
                _check_window(self.windows.shape[1], each)
                check_token_ids(self.windows, each)

    def logits(self, first: int, ids: Tensor) -> Tensor | None:
        """Return the dense model's logits of ``ids`` (n, T), the windows from ``first`` on; None without a dense model."""
        if self.model is None:
            return None
        kept = self._kept.get(first)
        if kept is not None and len(kept) == len(ids):
            return kept
        logits = self.model(input_ids=ids, use_cache=False).logits
        if logits[0].nbytes * len(self.windows) <= self.keep_bytes:
            self._kept[first] = logits
        return logits


def evaluate(
    model: str | Path,
    *,
    text: str = "wikitext2",
    sequence_length: int = 2048,
    max_windows: int | None = None,
    dense: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    on_event: Callable[[Event], None] | None = None,
    trust_remote_code: bool = False,
    reference: Reference | None = None,
) -> Evaluation:
    """Measure perplexity, and with ``dense`` the distance to the dense model.

    Rows are joined with a blank line and tokenised once, with the tokenizer's own special tokens; the ids are cut into
    windows that do not overlap, the remainder left out. Each window's tokens but the first are predicted; the losses of
    all windows are averaged and exponentiated. Log-probabilities are float32.

    Args:
        model: a hub name, a local folder or a ``.gguf`` file.
        text: ``wikitext2``, ``c4``, ``pydoc`` or a local file.
        sequence_length: tokens per window, at least 2.
        max_windows: score only the first so many windows.
        dense: the model to compare with; must have the same vocabulary.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``.
        on_event: is told about progress.
        trust_remote_code: let transformers run Python code that a checkpoint carries.
        reference: windows and dense model in place of ``text``, ``sequence_length``, ``max_windows`` and ``dense``; the
            windows must come from this model's tokenizer.

    Raises:
        UserError: the model, the text or the device cannot be used.
    """
    import transformers

    tell = EventStream(on_event)
    where = choose_device(device)
    rows = _rows(text, sequence_length, max_windows) if reference is None else []
    source = resolve_model(model, trust_remote_code=trust_remote_code)
    try:
        if reference is None:
            tokenizer, network = source.tokenizer(), load_model(source, dtype=dtype, device=where)
            other = None
            if dense is not None:
                other = load_model(resolve_model(dense, trust_remote_code=trust_remote_code), dtype=dtype, device=where)
            windows = cut_windows("\n\n".join(rows), tokenizer, network, text, sequence_length, max_windows)
            name = None if dense is None else str(dense)
            reference = Reference(text=text, windows=windows, dense=name, model=other)
        else:
            network = load_model(source, dtype=dtype, device=where)
        reference.check(network)
        began = time.perf_counter()
        sums = _score(network, reference, tell)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        elsewhere = "" if where.type == "cpu" else ", or use --device cpu"
        raise ResourceError(
            f"out of memory on {where}: lower --sequence-length (now {sequence_length}){elsewhere}"
        ) from error
    seconds = time.perf_counter() - began
    compared = reference.model is not None
    count, length = reference.windows.shape
    tokens = count * (length - 1)
    loss = sums[0] / tokens
    return Evaluation(
        model=str(model),
        text=reference.text,
        text_sha256=hashlib.sha256(reference.windows.numpy().astype("<i8").tobytes()).hexdigest(),
        sequence_length=length,
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


def _rows(text: str, sequence_length: int, max_windows: int | None) -> list[str]:
    if sequence_length < 2:
        raise DataError(f"sequence_length must be at least 2, to predict one token; got {sequence_length}")
    if max_windows is not None and max_windows < 1:
        raise DataError(f"max_windows must be at least 1; got {max_windows}")
    return evaluation_rows(text)


def _perplexity(mean_loss: float) -> float:
    return math.exp(mean_loss) if mean_loss < 700 else math.inf


def cut_windows(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    name: str,
    sequence_length: int,
    max_windows: int | None,
) -> Tensor:
    """Tokenise a text once and cut it into windows, (windows, sequence_length) int64.

    Raises:
        DataError: the text is shorter than one window, or the window longer than the model's positions.
    """
    _check_window(sequence_length, model)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    count = len(ids) // sequence_length
    if count == 0:
        raise DataError(
            f"the text {name} has {len(ids)} tokens, fewer than one window of {sequence_length}; lower --sequence-length"
        )
    count = min(count, max_windows or count)
    check_token_ids(ids, model)
    return ids[: count * sequence_length].view(count, sequence_length)


def _check_window(sequence_length: int, model: PreTrainedModel) -> None:
    positions = context_length(model.config)
    if positions is not None and sequence_length > positions:
        raise DataError(f"sequence_length {sequence_length} is beyond the model's {positions} positions; lower it")


@torch.inference_mode()
def _score(model: PreTrainedModel, reference: Reference, tell: Callable[[Event], None]) -> list[float]:
    """Return sums over all predicted tokens: loss, KL divergence, equal most probable tokens, the dense model's loss."""
    total, length = reference.windows.shape
    sums = torch.zeros(4, dtype=torch.float64)
    for index in range(total):
        ids = reference.windows[index : index + 1].to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0]
        both = reference.logits(index, ids)
        dense = None if both is None else both[0]
        if dense is not None and dense.shape != logits.shape:
            raise DataError(f"the dense model predicts {dense.shape[1]} tokens, the model {logits.shape[1]}: no pair")
        for first in range(0, length - 1, _CHUNK):
            last = min(first + _CHUNK, length - 1)
            part = None if dense is None else dense[first:last]
            sums += _score_chunk(logits[first:last], part, ids[0, first + 1 : last + 1])
        if not bool(torch.isfinite(sums).all()):
            which = "model" if not math.isfinite(float(sums[0])) else "dense model"
            raise NumericsError(f"the {which} gives NaN or infinite logits in window {index}; try --dtype float32")
        done = index + 1
        tell(Event(kind="progress", phase="evaluate", done=done, total=total, tokens=done * (length - 1)))
    return sums.tolist()


def _score_chunk(logits: Tensor, dense: Tensor | None, targets: Tensor) -> Tensor:
    log_p = logits.float().log_softmax(-1)
    loss = F.nll_loss(log_p, targets, reduction="none").double().sum()
    if dense is None:
        return torch.stack([loss, *torch.zeros_like(loss).expand(3)]).cpu()
    log_q = dense.float().log_softmax(-1)
    divergence = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1).double().sum()
    equal = (log_p.argmax(-1) == log_q.argmax(-1)).double().sum()
    dense_loss = F.nll_loss(log_q, targets, reduction="none").double().sum()
    return torch.stack([loss, divergence, equal, dense_loss]).cpu()
