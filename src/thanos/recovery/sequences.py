"""The order of the sequences in a training."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

from thanos.recovery.recipe import RecoveryRecipe


class Sequences(Dataset[dict[str, Tensor]]):
    """The sequences of all epochs, one after another, each epoch in an order of its own.

    An item has its token ids and its number, from 0.

    The position in the training alone determines the sequence, so a resumed training needs no state for the order.

    Args:
        ids: token ids of the sequences that are trained on, (n, T).
        recipe: gives the number of epochs, and the seed of their orders.
    """

    def __init__(self, ids: Tensor, recipe: RecoveryRecipe) -> None:
        self._ids = ids
        draws = [torch.Generator().manual_seed(1_000_003 * recipe.seed + epoch) for epoch in range(recipe.epochs)]
        self._order = torch.cat([torch.randperm(len(ids), generator=draw) for draw in draws])

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number = self._order[index]
        return {"ids": self._ids[number], "numbers": number}
