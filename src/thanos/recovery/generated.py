"""Text that the dense model generates for the training, in addition to the calibration text.

A model learns few sequences by heart. The dense model can generate as many more as are wanted: it continues pieces of the
calibration text. What it predicts is the right answer for any text, so also for its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thanos.calibration.generation import continue_prompts
from thanos.calibration.windows import begin_windows
from thanos.events import Event
from thanos.recovery.sequences import SEGMENT

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT = 32
"""Tokens of a piece of the calibration text that the dense model continues, to :data:`~thanos.recovery.sequences.SEGMENT`."""

_BATCH = {"cpu": 16, "cuda": 2048}
"""Pieces that are continued together, by type of device; fewer if memory does not suffice."""


def generate_sequences(
    model: PreTrainedModel, ids: Tensor, bos: int | None, count: int, seed: int, pad: int, emit: Callable[[Event], None]
) -> Tensor:
    """Return sequences of continued pieces of a text.

    Each piece begins with :data:`PROMPT` tokens from a random place of the text, or with half a segment if that is shorter.

    Args:
        model: the dense model.
        ids: token ids of the text, (n, T) int64, on the CPU.
        bos: id of the token with which each sequence begins; None without one.
        count: number of sequences to generate.
        seed: seed of the places and of the samples.
        pad: any token id.
        emit: function that is called with the progress.

    Returns:
        Token ids, (count, T) int64, on the CPU.
    """
    text = ids if bos is None else ids[:, 1:]
    width = text.shape[1]
    segment = min(SEGMENT, width)
    prompt = max(1 if bos is None else 0, min(PROMPT, segment // 2))  # BOS alone is a prompt, too
    pieces = math.ceil(count * width / segment)
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(text), (pieces, 1), generator=draw)
    columns = torch.randint(width - prompt + 1, (pieces, 1), generator=draw) + torch.arange(prompt)
    begun = begin_windows(text[rows, columns], bos)
    length = segment + (bos is not None)
    made, batch = None, _BATCH[model.device.type]
    while made is None:
        try:
            made = continue_prompts(model, begun, length, seed, pad, batch, "generate", emit)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        if made is None:  # outside the except block, where the error's traceback still refers to tensors
            torch.cuda.empty_cache()
            batch //= 2
    text_only = made if bos is None else made[:, 1:]
    return begin_windows(text_only.flatten()[: count * width].view(count, width), bos)
