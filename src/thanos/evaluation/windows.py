"""Evaluation windows of a text, and the position of the beginning-of-text token (BOS) in them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thanos.calibration.windows import begin_windows, check_positions
from thanos.errors import DataError
from thanos.model.bos import Bos, added_bos, defined_bos, plain_ids, without_bos
from thanos.model.loading import check_token_ids, context_length

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

LOWER = 0.9
"""``auto`` puts BOS in each window if the perplexity with it is at most this fraction of the perplexity without it."""

_TRIED_TOKENS = 8192
"""Tokens of the windows on which ``auto`` is decided; at least one window. They cost little, and are enough to detect a
difference of 10 % reliably."""

_TRIED_CHARACTERS = 24
"""Characters of the text that are tokenised for each token of these windows: more than a token has in any language."""


def decide_bos(
    asked: str,
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    mean_loss: Callable[[Tensor], float | None],
    note: Callable[[str], None],
    max_windows: int | None = None,
) -> Bos:
    """Return the position of BOS. ``auto`` compares the losses on the first windows of a text, with and without BOS in each.

    By convention there is one BOS, at the start of the text. So the first window is the same in both cases, and only the
    windows after it are scored.

    Args:
        asked: one of :data:`~thanos.model.bos.BOS_CHOICES`.
        text: the text of the evaluation.
        tokenizer: tokenizer of the model.
        sequence_length: tokens per window, T.
        mean_loss: function that returns the loss of windows (n, T) in nats per token; None if it cannot score them.
        note: function called with a line that states both perplexities.
        max_windows: largest number of windows of the evaluation; None for all.

    Raises:
        DataError: ``asked`` is ``window``, and the tokenizer defines no BOS.
    """
    bos = added_bos(tokenizer)
    if asked == "window" and defined_bos(tokenizer) is None:
        raise DataError(
            "bos 'window' asks for a beginning-of-text token, which the tokenizer does not have; leave it out"
        )
    if bos is None and asked != "window":
        return "none"
    if asked != "auto":
        return "window" if asked == "window" else "text"
    if max_windows == 1:  # a single window begins with BOS either way
        return "text"
    length, most = sequence_length, 1 + max(1, _TRIED_TOKENS // sequence_length)
    head = text[: most * length * _TRIED_CHARACTERS]
    ids = without_bos(plain_ids(tokenizer, head), bos)
    count = min(len(ids) // length, most)
    if count < 2:  # the same holds here
        return "text"
    without = torch.tensor([bos, *ids])[: count * length].view(count, length)
    with_bos = begin_windows(torch.tensor(ids)[: count * (length - 1)].view(count, length - 1), bos)
    losses = mean_loss(without[1:]), mean_loss(with_bos[1:])
    if losses[0] is None or losses[1] is None:
        return "text"
    choice: Bos = "window" if losses[1] <= losses[0] + math.log(LOWER) else "text"
    where = "at the start of each window" if choice == "window" else "only at the start of the text"
    shown = [f"{math.exp(min(loss, 700)):.4g}" for loss in losses if loss is not None]
    note(
        f"the first windows have perplexity {shown[0]} without BOS and {shown[1]} with BOS in each: BOS is put {where}"
    )
    return choice


def cut_windows(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    name: str,
    sequence_length: int,
    max_windows: int | None,
    bos: Bos = "text",
) -> Tensor:
    """Tokenise a text once and cut it into windows, (windows, sequence_length) int64.

    If ``bos`` is ``window``, each window consists of BOS and sequence_length − 1 tokens of the text. Otherwise the tokenizer's
    output is cut unchanged.

    Raises:
        DataError: the text is shorter than one window, or a window is longer than the model's number of positions.
    """
    check_window(sequence_length, model.config)
    begin = defined_bos(tokenizer) if bos == "window" else None
    ids = _ids(text, tokenizer, begin)
    length = sequence_length if begin is None else sequence_length - 1  # tokens of the text per window
    count = len(ids) // length
    if count == 0:
        begins = "" if begin is None else ", of which the first is the beginning-of-text token"
        raise DataError(
            f"the text {name} has {len(ids)} tokens, fewer than one window of {sequence_length}{begins}; lower "
            "--sequence-length"
        )
    count = min(count, max_windows or count)
    windows = begin_windows(ids[: count * length].view(count, length), begin)
    check_token_ids(ids, model)
    return windows


def _ids(text: str, tokenizer: PreTrainedTokenizerBase, begin: int | None) -> Tensor:
    if begin is not None:
        return torch.tensor(without_bos(plain_ids(tokenizer, text), begin))
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]  # type: ignore[assignment]
    # If the text itself begins with BOS, the tokenizer has added a second one.
    twice = len(ids) > 1 and ids[0] == ids[1] and ids[0] == added_bos(tokenizer)
    return torch.tensor(ids[1:] if twice else ids)


def check_window(sequence_length: int, config: PreTrainedConfig) -> None:
    """Raise DataError for windows that are longer than a model's number of positions."""
    check_positions(sequence_length, context_length(config))
