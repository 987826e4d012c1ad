"""The text of each epoch, and the order of its sequences in the training.

A model learns few sequences by heart if they are the same in all epochs: the training loss falls far below the held-out one.
So the text is varied in each epoch (:func:`recut`, :func:`replace_some`). What the dense model predicts is the right answer for
any text, also for one that nobody wrote.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

from thanos.calibration.windows import begin_windows
from thanos.recovery.recipe import RecoveryRecipe

SEGMENT = 256
"""Tokens of a segment of the text that is moved as a whole."""

REPLACED = 0.05
"""Probability with which a token is replaced."""


class Sequences(Dataset[dict[str, Tensor]]):
    """The sequences of all epochs, one after another, each epoch in an order of its own.

    An item has its token ids, (T,). If the text is the same in all epochs, it also has the sequence's number, from 0.

    An item depends only on its index and on the seed, whatever the device. So a resumed training needs no state for the text,
    and all processes have the same text.

    Args:
        ids: token ids of the sequences that are trained on, (n, T) int64, on the CPU.
        bos: ids of the tokens with which each sequence begins; empty without any.
        recipe: gives the number of epochs, the seed, and whether the text is varied.
    """

    def __init__(self, ids: Tensor, bos: tuple[int, ...], recipe: RecoveryRecipe) -> None:
        self._ids, self._bos, self._recipe = ids, bos, recipe
        self._current: tuple[int, Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return self._recipe.epochs * len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        epoch, position = divmod(index, len(self._ids))
        if self._current is None or self._current[0] != epoch:
            self._current = (epoch, *self._made(epoch))
        _, order, text = self._current
        number = order[position]
        return {"ids": text[number]} if self._recipe.vary else {"ids": text[number], "numbers": number}

    def _made(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Return the order (n,) and the token ids (n, T) of an epoch."""
        draw = torch.Generator().manual_seed(1_000_003 * self._recipe.seed + epoch)
        order = torch.randperm(len(self._ids), generator=draw)
        if not self._recipe.vary:
            return order, self._ids
        return order, replace_some(recut(self._ids, self._bos, draw), self._bos, draw)


def recut(ids: Tensor, bos: tuple[int, ...], draw: torch.Generator) -> Tensor:
    """Cut the text elsewhere, and join the segments in a new order.

    All sequences in order are one stream of tokens. It is rolled by a random offset and cut into segments of :data:`SEGMENT`
    tokens, or of a whole sequence's if that is shorter; the last segment takes the rest. The segments in random order are the
    new stream. BOS is no part of it: each sequence begins with BOS, as before.

    Args:
        ids: token ids, (n, T) int64, on the CPU.
        bos: ids of the tokens with which each sequence begins; empty without any.
        draw: the random numbers.

    Returns:
        The same tokens in another order, (n, T).
    """
    text = _text(ids, bos)
    stream = text.flatten().roll(int(torch.randint(text.numel(), (), generator=draw)))
    segments = stream.split(min(SEGMENT, text.shape[1]))
    order = torch.randperm(len(segments), generator=draw).tolist()
    return begin_windows(torch.cat([segments[number] for number in order]).view(text.shape), bos)


def replace_some(ids: Tensor, bos: tuple[int, ...], draw: torch.Generator) -> Tensor:
    """Replace each token, with probability :data:`REPLACED`, by one that is drawn from all tokens; never the BOS at the start.

    Args:
        ids: token ids, (n, T) int64, on the CPU.
        bos: ids of the tokens with which each sequence begins; empty without any.
        draw: the random numbers.

    Returns:
        Token ids, (n, T).
    """
    text = _text(ids, bos)
    chosen = torch.rand(text.shape, generator=draw) < REPLACED
    drawn = text.flatten()[torch.randint(text.numel(), text.shape, generator=draw)]
    return begin_windows(torch.where(chosen, drawn, text), bos)


def _text(ids: Tensor, bos: tuple[int, ...]) -> Tensor:
    """Return the sequences without the BOS at their start."""
    return ids[:, len(bos) :]
