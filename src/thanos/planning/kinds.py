"""The work of a run, its blocks by kind, and the cost of a block extrapolated from its samples."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from thanos.engine.stages.tune_cost import tuning_passes
from thanos.model.layers import block_names, find_blocks
from thanos.recipe import Recipe
from thanos.recipe.repair import held_out_count
from thanos.run.setup import Prepared


@dataclass(frozen=True, slots=True)
class Amount:
    """The sequences and epochs that a block works through.

    Attributes:
        training: number of sequences that are not held out.
        held_out: number of sequences that are.
        epochs: epochs of the block's tuning.
    """

    training: int
    held_out: int = 0
    epochs: int = 0

    @property
    def sequences(self) -> int:
        """Number of all sequences."""
        return self.training + self.held_out

    def units(self, phase: str) -> tuple[float, float]:
        """Return two numbers. The cost of a phase is expected to grow linearly with each of them."""
        if phase == "tune":
            return tuning_passes(self.epochs, self.sequences, self.held_out), 0.0
        if phase == "choose":
            return 0.0, float(self.held_out)
        if phase in ("calibration", "propagate"):
            return float(self.sequences), 0.0
        return float(self.training), float(self.held_out)


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

    @property
    def held_out(self) -> int:
        """Number of calibration sequences that are held out."""
        return held_out_count(self.recipe, self.samples)

    def amount(self, block: int | None) -> Amount:
        """Return the sequences and epochs of the run for a block."""
        repairs = [settings.repair for layer, settings in self.prepared.layers.items() if layer.block == block]
        epochs = 0 if block is None else max((repair.tune for repair in repairs), default=0)
        return Amount(self.samples - self.held_out, self.held_out, epochs)

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
        for index in self.prepared.data_flow.reached:
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
    """Return the texts, without numbers, and flags of a module: attention in a window and full attention differ in them."""
    return sorted((name, re.sub(r"\d", "", str(v))) for name, v in vars(module).items() if isinstance(v, str | bool))


@dataclass(frozen=True, slots=True)
class Sample:
    """Measurements of one block on some sequences.

    Attributes:
        amount: the sequences and epochs.
        batch: largest number of sequences in a forward pass.
        seconds: phase → seconds.
        busy: phase → seconds of the processor, summed over all threads; on CUDA the same as ``seconds``.
        peaks: phase → peak growth of host and device memory in bytes, without the hidden states of the sequences and the inputs
            of branches.
        over_sequences: phases that run over the sequences.
        state_bytes: bytes of the hidden states of one sequence in all streams.
        buffers: number of buffers of hidden states: the streams keep as many copies.
        branch_bytes: bytes of each input of a branch's last layer that is kept, for one sequence.
        fits: see :class:`~thanos.engine.block_runner.Passes`.
        with_branches: phases in which inputs of branches are kept.
    """

    amount: Amount
    batch: int
    seconds: dict[str, float]
    busy: dict[str, float]
    peaks: dict[str, tuple[int, int]]
    over_sequences: frozenset[str]
    state_bytes: int
    buffers: int
    branch_bytes: list[int]
    fits: int | None
    with_branches: frozenset[str] = frozenset()


@dataclass(slots=True)
class Kind:
    """Blocks of the same structure and settings, which are expected to cost the same.

    Attributes:
        blocks: indices of the blocks; ``[None]`` for the layers after the blocks.
        tries: the samples of each tried block: with few sequences, with more of them, and with more that are held out.
    """

    blocks: list[int | None]
    tries: list[Sequence[Sample]] = field(default_factory=list)

    @property
    def phases(self) -> list[str]:
        """The phases, in the order in which a block first runs through them."""
        return list(dict.fromkeys(phase for samples in self.tries for phase in samples[-1].seconds))

    def seconds(self, phase: str, amount: Amount) -> float:
        """Return the seconds of a phase for one block and these sequences and epochs.

        The growth with the number of sequences is that of the processor's seconds, which other programs disturb least. The
        result is multiplied by the measured ratio of elapsed to processor seconds, which depends on the number of threads and
        on other programs.
        """
        tries = [samples for samples in self.tries if phase in samples[-1].seconds]
        if not tries:
            return 0.0
        passed = [fmean(one.seconds.get(phase, 0.0) for one in same) for same in zip(*tries, strict=True)]
        busy = [fmean(one.busy.get(phase, 0.0) for one in same) for same in zip(*tries, strict=True)]
        if phase not in tries[0][-1].over_sequences or not sum(busy):
            return fmean(passed)
        units = [one.amount.units(phase) for one in tries[0]]
        return _extrapolated(busy, units, amount.units(phase)) * sum(passed) / sum(busy)

    def keeps_branches(self, phase: str) -> bool:
        """Return whether inputs of branches are kept in a phase."""
        return any(phase in sample.with_branches for samples in self.tries for sample in samples)

    def peak(self, phase: str, batch: int) -> tuple[int, int]:
        """Return the peak growth of host and device memory in a phase, with batches of this size."""
        known = [_peak(samples, phase, batch) for samples in self.tries if phase in samples[-1].peaks]
        return max((host for host, _ in known), default=0), max((device for _, device in known), default=0)


_APART = 1.3
"""Least ratio of two amounts of work whose difference gives a rate. Below it, the cost is assumed to be proportional."""


def _extrapolated(costs: Sequence[float], units: Sequence[tuple[float, float]], wanted: tuple[float, float]) -> float:
    """Return the cost at ``wanted``, linear in both units. A rate that is negative because of noise counts as 0."""
    (x, y), reference = units[0], 0
    each = other = 0.0
    for number, (along, across) in enumerate(units[1:], 1):
        if across == y and along >= max(_APART * x, units[reference][0] + 1):
            reference = number
            each = min(max(0.0, costs[number] - costs[0]) / (along - x), costs[number] / along)
        elif along == x and across > y:
            other = min(max(0.0, costs[number] - costs[0]) / (across - y), costs[number] / across)
    if not reference and x:
        each = (costs[0] - other * y) / x
    at = units[reference]
    return costs[reference] + each * (wanted[0] - at[0]) + other * (wanted[1] - at[1])


def _peak(samples: Sequence[Sample], phase: str, batch: int) -> tuple[int, int]:
    """Extrapolate the memory of samples with few and with more sequences to a larger batch."""
    few, more = samples[0], max(samples, key=lambda sample: sample.batch)
    host, device = (max(one.peaks.get(phase, (0, 0))[i] for one in samples) for i in (0, 1))
    fixed = phase == "tune" or phase not in more.over_sequences  # the passes of the tuning have batches of their own
    if more.batch >= batch or more.batch == few.batch or fixed:
        return host, device
    before, on_device = few.peaks.get(phase, (0, 0))
    further = (batch - more.batch) / (more.batch - few.batch)
    return host + int(further * max(0, host - before)), device + int(further * max(0, device - on_device))


def block_seconds(job: Job, kinds: list[Kind], amount: Callable[[int | None], Amount]) -> dict[str, float]:
    """Return the seconds of each phase of all blocks, by their kinds; ``amount`` gives the sequences and epochs of a block."""
    kind_of = {block: kind for kind in kinds for block in kind.blocks}
    calibration = fmean(kind.seconds("calibration", amount(kind.blocks[0])) for kind in kinds)
    seconds = {"load": 0.0, "calibration": calibration}
    last, busy = len(find_blocks(job.prepared.opened.meta_model)[1]) - 1, 0.0
    for block in sorted(kind_of, key=lambda block: (block is None, block or 0)):
        spent = {name: kind_of[block].seconds(name, amount(block)) for name in kind_of[block].phases}
        del spent["calibration"]
        if block == last and None not in kind_of:
            spent.pop("propagate", None)  # nothing reads the last block's outputs
        # A block is read during the work on the block before it.
        seconds["load"] += max(0.0, spent.pop("load", 0.0) - busy)
        busy = sum(spent.values())
        for name, value in spent.items():
            seconds[name] = seconds.get(name, 0.0) + value
    return seconds
