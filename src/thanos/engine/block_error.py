"""The error of a block: the distance of its outputs from the dense block's outputs in the dense model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from thanos.engine.block_runner import Passes
from thanos.engine.dense_stream import DenseStream
from thanos.engine.distributed import World
from thanos.engine.weights import ModelWeights

INHERITED = "dense"
"""Name of the first entry of :attr:`BlockErrors.errors`: the block is dense, but its inputs are those of the pruned model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockErrors:
    """The error of one block after each stage.

    The error is ‖F(X̂) − F*(X*)‖² / ‖F*(X*)‖², F and X̂ of the model pruned so far, F* and X* of the dense model.

    Attributes:
        block: index of the block.
        held_out: whether the sequences are the held-out ones. Tuning does not train on these, and layers whose dense target is
            chosen are not fitted to them; layers with a given dense target, or none, are. False: they are the first sequences,
            and everything is fitted to them.
        tokens: number of tokens of the sequences.
        errors: name of the stage → error after it; first ``dense``, before all stages.
        choices: each choice of a dense target, in order: ``layers``, the names of the layers, and ``errors``, candidate as
            text → mean of the tokens' relative errors with stand-ins; see :mod:`thanos.engine.dense_choice`.
        writers: names of the layers with a dense target that write into the residual stream; their target includes the error of
            the stream. Layers whose output is normalised or scaled first are not among them.
    """

    block: int
    held_out: bool
    tokens: int
    errors: dict[str, float] = field(default_factory=dict)
    choices: list[dict[str, Any]] = field(default_factory=list)
    writers: list[str] = field(default_factory=list)


class BlockMeter:
    """Measures the error of one block on some sequences of each process.

    Args:
        runner: the pruned stream.
        dense: the dense stream; the outputs of the block are known.
        weights: the model's parameters.
        world: the processes of the run.
        index: index of the block.
        sequences: indices of this process's sequences to measure on, consecutive.

    Attributes:
        tokens: number of tokens of the sequences of all processes; 0 before the first measurement.
    """

    def __init__(
        self, runner: Passes, dense: DenseStream, weights: ModelWeights, world: World, index: int, sequences: range
    ) -> None:
        self._runner, self._dense, self._weights, self._world = runner, dense, weights, world
        self._index, self._sequences = index, sequences
        self.tokens, self._notes = 0, list[str]()

    def take_notes(self) -> list[str]:
        """Return the warnings since the last call."""
        notes, self._notes = self._notes, []
        return notes

    @torch.no_grad()
    def error(self, values: Mapping[str, Tensor] | None = None, *, by_token: bool = False) -> float:
        """Return the block's relative squared error over the sequences of all processes, with other ``values`` of parameters.

        With ``by_token``, return the mean of the tokens' own relative errors instead.
        """
        while True:
            try:
                with self._weights.replaced(values or {}):
                    sums = self._sums(by_token, list(values or {}))
                break
            except torch.OutOfMemoryError as error:
                self._notes.append(self._runner.halve(error))
        lost, whole, sequences = self._world.sum_(sums).tolist()
        self.tokens = round(sequences) * self._runner.shape[1]
        return lost / whole if whole else 0.0

    def _sums(self, by_token: bool, changed: Sequence[str]) -> Tensor:
        """Return two sums over this process's sequences, and the number of these, (3,) float64.

        The sums are ‖F(X̂) − F*(X*)‖² and ‖F*(X*)‖²; with ``by_token`` their ratio for each token, and the number of tokens.
        ``changed`` are the names of parameters that have other values for now.
        """
        runner, size = self._runner, self._runner.settled(self._index)
        sums = torch.zeros(3, dtype=torch.float64, device=runner.device)
        sums[2] = len(self._sequences)
        begin, end = self._sequences.start, self._sequences.stop
        pairs = zip(runner.batches(size, begin, end), self._dense.outputs(size, begin, end), strict=True)
        for (first, hidden), (_, wanted) in pairs:
            with runner.branches.used(first, len(hidden), changed=changed):
                outputs = runner.run(self._index, hidden, first).to(torch.float32)
            wanted = wanted.to(torch.float32)
            change = (outputs - wanted).square_().sum(-1, dtype=torch.float64)
            whole = wanted.square().sum(-1, dtype=torch.float64)
            if by_token:
                change, whole = token_errors(change, whole), torch.ones_like(whole)
            sums[:2] += torch.stack([change.sum(), whole.sum()])
        return sums


def token_errors(change: Tensor, whole: Tensor) -> Tensor:
    """Return the relative squared errors of tokens, from the squared norms of error and wanted output; 0 if both are 0."""
    return torch.where(whole > 0, change / torch.where(whole > 0, whole, 1.0), 0.0)
