"""How much each decoder block changes the hidden states: the stage of the pass before blocks are removed."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from thanos.engine.stages.base import BlockContext
from thanos.engine.stages.measure import token_mean
from thanos.events import Event


class EffectStage:
    """Measures 1 − cos(h, F(h)), the mean over all tokens, for the inputs h and the outputs F(h) of each block.

    The cosine ignores the norm, as the normalisation in the next block does.

    Attributes:
        name: name of the stage.
        effects: index of the block → effect, in [0, 2]; filled block by block.
    """

    name = "effect"

    def __init__(self) -> None:
        self.effects: dict[int, float] = {}

    def __call__(self, context: BlockContext) -> Iterator[Event]:
        """See :class:`~thanos.engine.stages.base.BlockStage`."""
        if context.index is None:
            return
        with context.meter.phase("statistics"):
            found = []
            for first, hidden in context.batches(1):
                outputs = context.forward(hidden, first)
                cosine = torch.nn.functional.cosine_similarity(hidden.double(), outputs.double(), dim=-1)
                found.append((1 - cosine).flatten().cpu())
                yield context.progress("statistics", first + len(hidden))
            self.effects[context.index] = token_mean(context, found)
