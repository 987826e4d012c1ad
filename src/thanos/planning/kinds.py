"""The work of a run, its blocks by kind, and the cost of a block extrapolated from its samples."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from thanos.model.layers import block_names, find_blocks
from thanos.recipe import Recipe
from thanos.run.setup import Prepared


@dataclass(frozen=True, slots=True)
class Job:
    """The work of a run.

    Attributes:
        prepared: the opened model, and the layers to prune.
        recipe: the recipe.
        device: device of the run.
        ids: calibration token ids, (samples, T).
        folder: existing folder on the output's disk.
        activations: storage tier of the hidden states, or ``auto``.
    """

    prepared: Prepared
    recipe: Recipe
    device: torch.device
    ids: Tensor
    folder: Path
    activations: str

    @property
    def samples(self) -> int:
        """Number of calibration sequences."""
        return len(self.ids)

    def block_bytes(self, block: int | None) -> int:
        """Return the bytes of a block in memory, None for the whole model."""
        opened = self.prepared.opened
        name, _ = find_blocks(opened.meta_model)
        names = opened.key_of if block is None else block_names(opened.key_of, name, block)
        numel = sum(opened.checkpoint.tensors[opened.key_of[name]].numel for name in names)
        return numel * opened.meta_model.dtype.itemsize

    def untouched(self) -> list[str]:
        """Return the checkpoint names of the tensors that are not pruned, the largest first."""
        key_of, tensors = self.prepared.opened.key_of, self.prepared.opened.checkpoint.tensors
        pruned = {key_of[layer.weight_name] for layer in self.prepared.layers}
        return sorted((key for key in tensors if key not in pruned), key=lambda key: -tensors[key].nbytes)

    def kinds(self) -> list[Kind]:
        """Return the blocks that text reaches, by kind, and the layers after the blocks."""
        _, blocks = find_blocks(self.prepared.opened.meta_model)
        kinds: dict[str, Kind] = {}
        for index in self.prepared.picture.reached:
            tensors = [(name, tuple(value.shape)) for name, value in blocks[index].state_dict().items()]
            modules = [(type(module), _flags(module)) for module in blocks[index].modules()]
            kinds.setdefault(repr((tensors, modules, self._settings(index))), Kind([])).blocks.append(index)
        tail = [Kind([None])] if any(layer.block is None for layer in self.prepared.layers) else []
        return [*kinds.values(), *tail]

    def _settings(self, block: int) -> list[Any]:
        """Return the settings of a block's layers; without the sparsity, which may differ from layer to layer."""
        layers = self.prepared.layers.items()
        return [
            (layer.name.partition(f".{block}.")[2], {**asdict(settings), "sparsity": None})
            for layer, settings in layers
            if layer.block == block
        ]


def _flags(module: nn.Module) -> list[tuple[str, str]]:
    """Return the texts, without numbers, and flags of a module: they tell attention in a window from full attention."""
    return sorted((name, re.sub(r"\d", "", str(v))) for name, v in vars(module).items() if isinstance(v, str | bool))


@dataclass(frozen=True, slots=True)
class Sample:
    """Measurements of one block on some sequences.

    Attributes:
        sequences: number of sequences.
        batch: largest number of sequences in a forward pass.
        seconds: phase → seconds.
        busy: phase → seconds of the processor, all threads together; on CUDA those of ``seconds``.
        peaks: phase → peak growth of host and device memory in bytes, without the hidden states of the sequences.
        over_sequences: phases that run over the sequences.
        state_bytes: bytes of the hidden states of one sequence.
        fits: see :class:`~thanos.engine.block_runner.Passes`.
    """

    sequences: int
    batch: int
    seconds: dict[str, float]
    busy: dict[str, float]
    peaks: dict[str, tuple[int, int]]
    over_sequences: frozenset[str]
    state_bytes: int
    fits: int | None


@dataclass(slots=True)
class Kind:
    """Blocks of the same structure and settings, which are expected to cost the same.

    Attributes:
        blocks: indices of the blocks; ``[None]`` for the layers after the blocks.
        pairs: for each tried block, a sample with fewer and one with more sequences.
    """

    blocks: list[int | None]
    pairs: list[tuple[Sample, Sample]] = field(default_factory=list)

    @property
    def phases(self) -> list[str]:
        """The phases, in the order in which a block first runs through them."""
        return list(dict.fromkeys(phase for pair in self.pairs for phase in pair[1].seconds))

    def seconds(self, phase: str, sequences: int) -> float:
        """Return the seconds of a phase for one block and this number of sequences.

        The processor's seconds give the growth with the number of sequences: other programs disturb them least. The seconds
        that pass for each of them are measured too, and differ with other programs and the number of threads.
        """
        pairs = [pair for pair in self.pairs if phase in pair[1].seconds]
        if not pairs:
            return 0.0
        passed = [fmean(pair[i].seconds[phase] for pair in pairs) for i in (0, 1)]
        few, more = (fmean(pair[i].busy[phase] for pair in pairs) for i in (0, 1))
        fewer, number = pairs[0][0].sequences, pairs[0][1].sequences
        if phase not in pairs[0][1].over_sequences or fewer == number or not few + more:
            return fmean(passed)
        # Bounds for noisy measurements: neither the cost per sequence nor the rest is negative.
        each = min(max(0.0, (more - few) / (number - fewer)), more / number)
        return (more + each * (sequences - number)) * sum(passed) / (few + more)

    def peak(self, phase: str, batch: int) -> tuple[int, int]:
        """Return the peak growth of host and device memory in a phase, with batches of this size."""
        known = [_peak(few, more, phase, batch) for few, more in self.pairs if phase in more.peaks]
        return max((host for host, _ in known), default=0), max((device for _, device in known), default=0)


def _peak(few: Sample, more: Sample, phase: str, batch: int) -> tuple[int, int]:
    """Extrapolate the memory of two samples to a larger batch."""
    (host, device), (before, on_device) = more.peaks[phase], few.peaks[phase]
    if more.batch >= batch or more.batch == few.batch or phase not in more.over_sequences:
        return host, device
    further = (batch - more.batch) / (more.batch - few.batch)
    return host + int(further * max(0, host - before)), device + int(further * max(0, device - on_device))
