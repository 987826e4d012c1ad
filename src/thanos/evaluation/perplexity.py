"""Perplexity, and the distance to the dense model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thanos._version import __version__
from thanos.calibration.text import check_text_exists, check_text_source, evaluation_rows, fetch_text
from thanos.errors import DataError, NumericsError, resource_errors
from thanos.evaluation.scoring import Reference, score
from thanos.evaluation.windows import check_window, cut_windows, decide_bos
from thanos.events import Event
from thanos.model.bos import Bos, check_bos, ids_at
from thanos.model.loading import adapter_notes, load_model, parse_dtype
from thanos.model.source import find_local, resolve_model
from thanos.system.device import choose_device
from thanos.system.documents import Document
from thanos.system.event_stream import EventStream
from thanos.system.suggestions import near_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SCHEMA = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation(Document):
    """The result of :func:`evaluate`; the attributes are the keys of ``--json``.

    Attributes:
        model: as the user named it.
        text: source of the text.
        text_sha256: hash of the scored text's token ids (little-endian int64).
        sequence_length: tokens per window.
        bos: position of the beginning-of-text token: ``window`` (start of each window), ``text`` (start of the text only) or
            ``none`` (the tokenizer adds none).
        bos_ids: ids of the tokens at this position: one, or several if the tokenizer begins a text with several.
        windows: number of windows.
        tokens: number of tokens scored: sequence_length − 1 per window, minus the BOS tokens after the first.
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
    bos_ids: list[int]
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

    The rows of the text are joined with blank lines and tokenised once, with the tokenizer's own special tokens. The ids are
    cut into windows that do not overlap; the remainder is left out. All tokens of a window except the first are predicted.
    The perplexity is the exponential of the mean loss over all windows. Log-probabilities are float32.

    If the tokenizer begins a text with a beginning-of-text token (BOS) or with several, they are at the start of the text only,
    or at the start of each window (``bos``). In the second case tokens of the text fill the rest of a window. BOS is never
    predicted.

    Args:
        model: a hub name, a local folder or a ``.gguf`` file.
        text: ``wikitext2``, ``c4``, ``pydoc`` or local files (text_files.py).
        sequence_length: tokens per window, at least 2.
        max_windows: largest number of windows, from the first on; None for all.
        dense: the model to compare with; must have the same vocabulary.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``.
        bos: position of BOS: ``window`` or ``text``; ``auto``: ``window`` if that lowers the perplexity of the dense model
            (without one, of this model) on the first windows by at least 10 %.
        on_event: function called with events of progress.
        trust_remote_code: let transformers run Python code from a checkpoint.
        reference: windows and dense model that replace ``text``, ``sequence_length``, ``max_windows``, ``dense`` and ``bos``;
            the windows must come from this model's tokenizer.
        network: the model, if it is loaded already. It is scored on its own device and in its own dtype; ``device`` and
            ``dtype`` are ignored.

    Raises:
        UserError: the model, the text or the device cannot be used.
    """
    emit = EventStream(on_event)
    _check_options(text, sequence_length, max_windows, dtype)
    on_disk = [find_local(model, trust_remote_code=trust_remote_code, packed=True)]
    dense = dense if reference is None else None
    if dense is not None:
        on_disk.append(find_local(dense, trust_remote_code=trust_remote_code, packed=True, what="the dense model"))
    where = choose_device(device) if network is None else network.device
    if reference is None:
        check_bos(bos)
        check_text_exists(text, evaluation=True)
        if None in on_disk:  # a text is smaller than the model that is downloaded next
            fetch_text(text, evaluation=True)
    source = resolve_model(model, trust_remote_code=trust_remote_code, packed=True)
    dense_source = None if dense is None else resolve_model(dense, trust_remote_code=trust_remote_code, packed=True)
    tokenizer, joined = None, ""
    if reference is None:
        for each in (source, dense_source):
            if each is not None:
                for line in adapter_notes(each):
                    emit(Event(kind="note", phase="evaluate", message=line))
                check_window(sequence_length, each.config())
        tokenizer = source.tokenizer()
        check_text_source(text, evaluation=True, tokenizer=source.tokenizer)  # the first rows, before all of them
        joined = joined_text(text, tokenizer, emit)
    length = sequence_length if reference is None else reference.windows.shape[1]
    with resource_errors(f"lower --sequence-length (now {length})", device=where):
        if network is None:
            network = load_model(source, dtype=dtype, device=where)
        if reference is None:
            assert tokenizer is not None
            other = None
            if dense_source is not None:
                other = load_model(dense_source, dtype=dtype, device=where)
            chosen = choose_bos(bos, joined, tokenizer, other or network, sequence_length, emit, max_windows)
            windows = cut_windows(joined, tokenizer, network, text, sequence_length, max_windows, chosen)
            name = None if dense is None else str(dense)
            ids = ids_at(chosen, tokenizer)
            reference = Reference(text=text, windows=windows, dense=name, model=other, bos=chosen, bos_ids=ids)
        reference.check(network)
        began = time.perf_counter()
        sums = score(network, reference, emit)
    return _evaluation(str(model), network, reference, sums, time.perf_counter() - began)


def _evaluation(
    model: str, network: PreTrainedModel, reference: Reference, sums: list[float], seconds: float
) -> Evaluation:
    """Return the result for the sums of :func:`~thanos.evaluation.scoring.score`."""
    import transformers

    where, compared = network.device, reference.model is not None
    count, length = reference.windows.shape
    tokens = reference.tokens
    loss = sums[0] / tokens
    return Evaluation(
        model=model,
        text=reference.text,
        text_sha256=reference.sha256,
        sequence_length=length,
        bos=reference.bos,
        bos_ids=list(reference.bos_ids),
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


def joined_text(text: str, tokenizer: PreTrainedTokenizerBase, emit: Callable[[Event], None]) -> str:
    """Return the text of a source: its rows, joined with a blank line."""
    rows = evaluation_rows(text, tokenizer, lambda line: emit(Event(kind="note", phase="evaluate", message=line)))
    return "\n\n".join(rows)


def choose_bos(
    bos: str,
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    sequence_length: int,
    emit: Callable[[Event], None],
    max_windows: int | None = None,
) -> Bos:
    """Return the position of BOS in the windows of a text, by the losses of ``model``.

    See :func:`~thanos.evaluation.windows.decide_bos`. Raises DataError if ``bos`` is ``window`` and the tokenizer has no
    BOS, or if the windows do not fit the model.
    """

    def mean_loss(windows: Tensor, start: tuple[int, ...]) -> float | None:
        tried = Reference(text="", windows=windows, bos="window" if start else "none", bos_ids=start)
        tried.check(model)
        try:
            return score(model, tried, lambda event: None)[0] / tried.tokens
        except NumericsError:  # scoring the whole text reports it with the window's index
            return None

    check_window(sequence_length, model.config)
    return decide_bos(
        bos,
        text,
        tokenizer,
        sequence_length,
        mean_loss,
        lambda line: emit(Event(kind="note", phase="evaluate", message=line)),
        max_windows,
    )


def _check_options(text: str, sequence_length: int, max_windows: int | None, dtype: str) -> None:
    if not isinstance(text, str):
        raise DataError(f"text must be a name or path as a string; got {type(text).__name__} {str(text)[:60]!r}")
    for name, value in (("sequence_length", sequence_length), ("max_windows", max_windows)):
        if isinstance(value, bool) or not isinstance(value, int if name == "sequence_length" else int | None):
            raise DataError(f"{name} must be a whole number; got {value!r}{near_whole(value)}")
    if sequence_length < 2:
        raise DataError(f"sequence_length must be at least 2, to predict one token; got {sequence_length}")
    if max_windows is not None and max_windows < 1:
        raise DataError(f"max_windows must be at least 1; got {max_windows}")
    if dtype != "auto":
        parse_dtype(dtype)


def _perplexity(mean_loss: float) -> float:
    return math.exp(mean_loss) if mean_loss < 700 else math.inf
