"""The text of each epoch, and the order of its sequences in the training.

If the sequences are the same in all epochs, the model overfits to them: the training loss falls far below the held-out one. So
the text is varied in each epoch (:func:`recut`, :func:`replace_some`). The target is the dense model's prediction, which exists
for any text, so the varied text need not be natural.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

from thanos.calibration.generation import SEEDS
from thanos.calibration.windows import begin_windows
from thanos.recovery.recipe import RecoveryRecipe

REPLACED = 0.05
"""Probability with which a token is replaced."""


class Sequences(Dataset[dict[str, Tensor]]):
    """The sequences of all epochs, one epoch after another, each in another order.

    An item is a dict of ``ids``, token ids (T,). If the text is the same in all epochs, it also has the sequence's index in
    ``numbers``.

    An item depends only on its index and on the seed. So a resumed training needs no state for the text, and all processes have
    the same text.

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
            self._current = (epoch, *self._make_epoch(epoch))
        _, order, text = self._current
        number = order[position]
        return {"ids": text[number]} if self._recipe.vary else {"ids": text[number], "numbers": number}

    def _make_epoch(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Return the order (n,) and the token ids (n, T) of an epoch."""
        generator = torch.Generator().manual_seed((1_000_003 * self._recipe.seed + epoch) % SEEDS)
        order = torch.randperm(len(self._ids), generator=generator)
        if not self._recipe.vary:
            return order, self._ids
        return order, replace_some(recut(self._ids, self._bos, generator, self._recipe.segment), self._bos, generator)


def recut(ids: Tensor, bos: tuple[int, ...], generator: torch.Generator, segment: int) -> Tensor:
    """Cut the text into segments at other positions, and join them in a random order.

    All sequences in order are one stream of tokens. It is rolled by a random offset and cut into segments of
    min(``segment``, T) tokens; the last segment may be shorter. The segments in random order are the new stream. BOS is not
    part of the stream: each sequence begins with BOS, as before.

    Args:
        ids: token ids, (n, T) int64, on the CPU.
        bos: ids of the tokens with which each sequence begins; empty without any.
        generator: gives the random numbers.
        segment: tokens of a segment.

    Returns:
        The same tokens in another order, (n, T).
    """
    text = _without_bos(ids, bos)
    stream = text.flatten().roll(int(torch.randint(text.numel(), (), generator=generator)))
    segments = stream.split(min(segment, text.shape[1]))
    order = torch.randperm(len(segments), generator=generator).tolist()
    return begin_windows(torch.cat([segments[number] for number in order]).view(text.shape), bos)


def replace_some(ids: Tensor, bos: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Replace each token, with probability :data:`REPLACED`, by a random one of all tokens of the text, except BOS.

    Args:
        ids: token ids, (n, T) int64, on the CPU.
        bos: ids of the tokens with which each sequence begins; empty without any.
        generator: gives the random numbers.

    Returns:
        Token ids, (n, T).
    """
    text = _without_bos(ids, bos)
    chosen = torch.rand(text.shape, generator=generator) < REPLACED
    drawn = text.flatten()[torch.randint(text.numel(), text.shape, generator=generator)]
    return begin_windows(torch.where(chosen, drawn, text), bos)


def _without_bos(ids: Tensor, bos: tuple[int, ...]) -> Tensor:
    return ids[:, len(bos) :]
