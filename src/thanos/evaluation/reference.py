"""The windows of a text, made once for the evaluation of several models."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from thanos.evaluation.perplexity import choose_bos
from thanos.evaluation.scoring import Reference
from thanos.evaluation.windows import cut_windows
from thanos.events import Event
from thanos.model.bos import ids_at
from thanos.model.source import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def make_reference(
    source: ModelSource,
    network: PreTrainedModel,
    *,
    text: str,
    name: str,
    sequence_length: int,
    max_windows: int | None,
    bos: str,
    emit: Callable[[Event], None],
) -> Reference:
    """Return the reference of a text: its windows, and no dense model.

    Args:
        source: the model whose tokenizer is used.
        network: the model, loaded; its losses decide the position of BOS if ``bos`` is ``auto``.
        text: the text, from :func:`~thanos.evaluation.perplexity.joined_text`.
        name: the text's name in reports.
        sequence_length: tokens per window.
        max_windows: largest number of windows; None for all.
        bos: as for :func:`~thanos.evaluation.perplexity.evaluate`.
        emit: function called with notes.

    Raises:
        DataError: the text is shorter than one window, or its windows do not fit the model.
    """
    tokenizer = source.tokenizer()
    chosen = choose_bos(bos, text, tokenizer, network, sequence_length, emit, max_windows)
    windows = cut_windows(text, tokenizer, network, name, sequence_length, max_windows, chosen)
    return Reference(text=name, windows=windows, bos=chosen, bos_ids=ids_at(chosen, tokenizer))
