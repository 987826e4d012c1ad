"""Evaluation windows of a text, and the position of the beginning-of-text token (BOS) in them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thanos.calibration.windows import begin_windows, besides_text, check_positions, check_room
from thanos.errors import DataError
from thanos.model.bos import Bos, added_bos, plain_ids, window_bos, without_bos
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
    bos: str,
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    mean_loss: Callable[[Tensor, tuple[int, ...]], float | None],
    note: Callable[[str], None],
    max_windows: int | None = None,
) -> Bos:
    """Return the position of BOS. ``auto`` compares the losses on the first windows of a text, with and without BOS in each.

    By convention there is one BOS, at the start of the text. So the first window is the same in both cases, and only the
    windows after it are scored.

    Args:
        bos: one of :data:`~thanos.model.bos.BOS_CHOICES`.
        text: the text of the evaluation.
        tokenizer: tokenizer of the model.
        sequence_length: tokens per window, T.
        mean_loss: function of windows (n, T) and of the tokens with which each begins. It returns the loss in nats per token,
            without these tokens; None if it cannot score the windows.
        note: function called with a line that states both perplexities.
        max_windows: largest number of windows of the evaluation; None for all.

    Raises:
        DataError: ``bos`` is ``window``, and the tokenizer has no BOS; or BOS fills a window.
    """
    start = window_bos(tokenizer) if bos == "window" else added_bos(tokenizer)
    if not start and bos == "window":
        raise DataError(
            "--bos: window asks for a beginning-of-text token, which the tokenizer does not have; leave it out"
        )
    check_room(sequence_length, start)
    if not start:
        return "none"
    if bos != "auto":
        return "window" if bos == "window" else "text"
    if max_windows == 1:  # a single window begins with BOS either way
        return "text"
    length, most = sequence_length, 1 + max(1, _TRIED_TOKENS // sequence_length)
    head = text[: most * length * _TRIED_CHARACTERS]
    ids = without_bos(plain_ids(tokenizer, head), start)
    count = min(len(ids) // length, most)
    if count < 2:  # the same holds here
        return "text"
    room = length - len(start)
    without = torch.tensor([*start, *ids])[: count * length].view(count, length)
    with_bos = begin_windows(torch.tensor(ids)[: count * room].view(count, room), start)
    losses = mean_loss(without[1:], ()), mean_loss(with_bos[1:], start)
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

    If ``bos`` is ``window``, each window consists of BOS (one token or several) and tokens of the text. Otherwise the
    tokenizer's output is cut unchanged.

    Raises:
        DataError: the text is shorter than one window, or a window is longer than the model's number of positions.
    """
    check_window(sequence_length, model.config)
    begin = window_bos(tokenizer) if bos == "window" else ()
    ids = _ids(text, tokenizer, begin)
    length = sequence_length - len(begin)  # tokens of the text per window
    count = len(ids) // length
    if count == 0:
        begins = besides_text(len(begin))
        raise DataError(
            f"the text {name} has {len(ids)} {'token' if len(ids) == 1 else 'tokens'}, fewer than one window of "
            f"{sequence_length}{begins}; lower --sequence-length"
        )
    count = min(count, max_windows or count)
    windows = begin_windows(ids[: count * length].view(count, length), begin)
    check_token_ids(ids, model)
    return windows


def _ids(text: str, tokenizer: PreTrainedTokenizerBase, begin: tuple[int, ...]) -> Tensor:
    if begin:
        return torch.tensor(without_bos(plain_ids(tokenizer, text), begin))
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]  # type: ignore[assignment]
    # If the text itself begins with BOS, the tokenizer has added a second one.
    bos = added_bos(tokenizer)
    twice = bool(bos) and tuple(ids[: 2 * len(bos)]) == 2 * bos
    return torch.tensor(ids[len(bos) :] if twice else ids)


def check_window(sequence_length: int, config: PreTrainedConfig) -> None:
    """Raise DataError for windows that are longer than a model's number of positions."""
    check_positions(sequence_length, context_length(config))
