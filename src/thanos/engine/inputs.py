"""The inputs of an engine: the model, its layers and their settings, the readers and the writers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from thanos.checkpoint.writer import CheckpointWriter
from thanos.engine.block_runner import Passes
from thanos.engine.distributed import SINGLE, World
from thanos.engine.rank_zero import SharedWriter
from thanos.engine.records import BlockJournal
from thanos.engine.weights import ModelWeights
from thanos.model.layers import LinearLayer, block_names, outer_names
from thanos.recipe import LayerRecipe
from thanos.system.meter import PhaseMeter


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineInputs:
    """The inputs of an engine. No attribute is replaced during a run.

    Attributes:
        model: the meta model.
        blocks_name: full name of the module list that holds the decoder blocks.
        blocks: the decoder blocks.
        layers: the layers to prune, each with its settings.
        weights: the model's parameters.
        writer: writer of finished tensors.
        journal: journal of finished blocks; it holds the records of an interrupted run and takes new ones.
        runner: forward passes of blocks over the calibration sequences.
        device: device on which blocks run and layers are solved.
        meter: meter of seconds and peak memory by phase.
        world: the processes that share the work; each has its own sequences.
        first: index of this process's first sequence among those of all processes.
        held_out: indices of this process's sequences that are held out.
        held_out_of_all: number of held-out sequences of all processes.
        dropped: indices of the blocks that the pruned model leaves out.
    """

    model: nn.Module
    blocks_name: str
    blocks: list[nn.Module]
    layers: Mapping[LinearLayer, LayerRecipe]
    weights: ModelWeights
    writer: CheckpointWriter | SharedWriter
    journal: BlockJournal
    runner: Passes
    device: torch.device
    meter: PhaseMeter
    world: World = SINGLE
    first: int = 0
    held_out: range = field(default=range(0))
    held_out_of_all: int = 0
    dropped: frozenset[int] = frozenset()

    def runs(self, index: int) -> bool:
        """Return whether the pruned model runs a block. If not, the hidden states do not change."""
        return index not in self.dropped and self.runner.reaches(index)

    def dropped_after(self, index: int) -> list[int]:
        """Return the indices of the blocks right after a block that the pruned model leaves out."""
        later = range(index + 1, len(self.blocks))
        end = next((other for other in later if other not in self.dropped), len(self.blocks))
        return [other for other in range(index + 1, end) if self.runner.reaches(other)]

    def layers_of(self, block: int | None) -> dict[LinearLayer, LayerRecipe]:
        """Return the layers to prune in a block, with their settings; None for the modules outside the blocks."""
        return {layer: settings for layer, settings in self.layers.items() if layer.block == block}

    @property
    def dense_end(self) -> int:
        """Number of blocks, from the first, that need the dense stream. One more than all if layers after them need it."""
        after = len(self.blocks)
        wanting = [
            layer.block
            for layer, settings in self.layers.items()
            if (settings.repair.retargets if layer.block is None else settings.repair.needs_dense_stream)
        ]
        return 1 + max((after if block is None else block for block in wanting), default=-1)

    def block_names(self, index: int) -> list[str]:
        """Return the names of a block's parameters and buffers; see :func:`~thanos.model.layers.block_names`."""
        return block_names(self.weights.names, self.blocks_name, index)

    def outer_names(self, *, head: bool = True) -> list[str]:
        """Return the names of the parameters outside the blocks; see :func:`~thanos.model.layers.outer_names`."""
        return outer_names(self.model, self.weights.names, self.blocks_name, head=head)
