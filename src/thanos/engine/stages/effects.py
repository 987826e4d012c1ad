"""A stage that measures how the removal of each decoder block changes the model's outputs, before blocks are removed.

One pass over the blocks measures all of them. In addition to the hidden states of the model, each candidate block has a stream
of hidden states that skips the candidate: it begins with the candidate's inputs and runs through all later blocks. One block is
in memory at a time. It runs on the model's hidden states and on one stream for each candidate before it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from thanos.engine.activations import Activations
from thanos.engine.stages.base import BlockContext
from thanos.engine.stages.measure import token_mean
from thanos.events import Event

TOKENS = 512
"""Largest number of tokens of a sequence whose outputs are compared; they are evenly spaced."""

_ROWS = 128
"""Number of tokens whose logits are in memory at once, since a vocabulary has up to 256,000 entries."""

_MOST = 1e4
"""Largest divergence of a token, in nats; it is also the divergence of outputs that are not finite."""


class EffectStage:
    """Measures the divergence KL(dense ‖ model without the block), in nats per token, for some blocks. It changes no weight.

    Args:
        blocks: indices of the blocks that run, ascending.
        candidates: the blocks whose removal is measured. If a candidate comes before the first block that runs, as in a trial,
            its stream begins at that block.
        wanted: the dense model's last hidden states, from :attr:`wanted` of an earlier pass over all blocks with the same
            sequences; None in the first pass.

    Attributes:
        name: name of the stage.
        effects: candidate → divergence; filled after the last block.
        wanted: the dense model's last hidden states at the compared tokens, (1, tokens, d) for each sequence of this process.
    """

    name = "effect"

    def __init__(self, blocks: Sequence[int], candidates: Collection[int], wanted: list[Tensor] | None = None) -> None:
        self.effects: dict[int, float] = {}
        self.wanted: list[Tensor] = [] if wanted is None else wanted
        self._candidates, self._last = sorted(candidates), blocks[-1]
        self._streams: dict[int, Activations] = {}

    def __call__(self, context: BlockContext) -> Iterator[Event]:
        """See :class:`~thanos.engine.stages.base.BlockStage`."""
        if context.index is None:
            return
        with context.meter.phase("statistics"):
            self._start(context, [block for block in self._candidates if block < context.index])
            yield from self._advance(context)
            self._start(context, [block for block in self._candidates if block == context.index])
        if context.index == self._last:
            with context.meter.phase("dense"):
                yield from self._compare(context)
            self.close()

    def close(self) -> None:
        """Free the streams."""
        for stream in self._streams.values():
            stream.close()
        self._streams = {}

    def _start(self, context: BlockContext, blocks: Sequence[int]) -> None:
        """Begin a stream for each of these blocks that has none, with the inputs of the current block."""
        self._streams |= {block: context.runner.copied() for block in blocks if block not in self._streams}

    def _advance(self, context: BlockContext) -> Iterator[Event]:
        """Run the block on all streams, one sequence at a time."""
        streams = [(stream, stream.batches(1)) for stream in self._streams.values()]
        for row in range(context.runner.shape[0]):
            for stream, states in streams:
                _, hidden = next(states)
                stream.write(row, context.forward(hidden, row))
            yield context.progress("statistics", row + 1)
        for stream, _ in streams:
            stream.flush()

    def _compare(self, context: BlockContext) -> Iterator[Event]:
        """Compare the outputs of all streams with those of the dense model."""
        samples, length = context.runner.shape
        picks = torch.linspace(0, length - 1, min(TOKENS, length), device=context.device).round().long()
        if not self.wanted:
            self.wanted = [context.forward(hidden, row)[:, picks] for row, hidden in context.batches(1)]
        # Allocated first: small tensors that stay between large temporary ones would fragment the memory.
        found = {block: torch.zeros(samples, len(picks), dtype=torch.float64) for block in self._streams}
        streams = {block: stream.batches(1) for block, stream in self._streams.items()}
        with context.outer_weights():
            for row in range(samples):
                states = {block: next(stream)[1][:, picks] for block, stream in streams.items()}
                for start in range(0, len(picks), _ROWS):
                    rows = slice(start, start + _ROWS)
                    wanted = _log_probabilities(context, row, self.wanted[row][:, rows])
                    for block, hidden in states.items():
                        found[block][row, rows] = _divergence(wanted, _log_probabilities(context, row, hidden[:, rows]))
                yield context.progress("dense", row + 1)
        self.effects = {block: token_mean(context, [values.flatten()]) for block, values in found.items()}


def _log_probabilities(context: BlockContext, row: int, hidden: Tensor) -> Tensor:
    """Return the logarithms of the probabilities of the next token, (tokens, V) float32."""
    return context.runner.observe_tail_of(row, hidden).logits[0].float().log_softmax(-1)


def _divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """Return KL(wanted ‖ found) of each token, (tokens,) float64."""
    lost = (wanted.exp() * (wanted - found)).sum(-1, dtype=torch.float64)
    return lost.nan_to_num(nan=_MOST).clamp(max=_MOST)
