"""Bytes and seconds of a run by phase: the amount of work, times the rates that a trial measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from thanos.calibration.statistics import plan_passes, statistics_budget
from thanos.engine.stages.prune import observed_fractions
from thanos.model.layers import LinearLayer, block_names, find_blocks, outer_names
from thanos.planning.device_rates import Rates
from thanos.planning.memory_model import LayerWork, groups, hessian_bytes, largest_sum, solving_bytes
from thanos.planning.trial import BlockTrial
from thanos.recipe import Recipe
from thanos.run.setup import Prepared
from thanos.system.staging import STAGING_BYTES

_GENERATED_TOGETHER = 16  # sequences in a batch of generated text, as in calibration/windows.py


@dataclass(slots=True)
class Job:
    """The work of a run.

    Args:
        prepared: the opened model, and the layers to prune.
        recipe: the recipe.
        device: device of the run.
        ids: calibration token ids, (samples, T).

    Attributes:
        blocks_name: full name of the module list that holds the decoder blocks.
        block_bytes: bytes of each block's weights in memory.
        shared: name of a layer within a block → number of its input, as the trial measured. Layers with the same number share
            their input.
    """

    prepared: Prepared
    recipe: Recipe
    device: torch.device
    ids: Tensor
    blocks_name: str = field(init=False)
    block_bytes: list[int] = field(init=False)
    shared: dict[str, int] = field(default_factory=dict)
    _by_block: dict[int | None, list[LinearLayer]] = field(init=False)

    def __post_init__(self) -> None:
        self.blocks_name, blocks = find_blocks(self.prepared.opened.meta_model)
        self.block_bytes = [self._in_memory(self.inside(index)) for index in range(len(blocks))]
        self._by_block = {index: [] for index in (*range(len(blocks)), None)}
        for layer in self.prepared.layers:
            self._by_block[layer.block].append(layer)

    @property
    def on_cuda(self) -> bool:
        """Whether the device is a CUDA device, with its own memory."""
        return self.device.type == "cuda"

    @property
    def shape(self) -> tuple[int, int]:
        """(samples, T)."""
        samples, length = self.ids.shape
        return samples, length

    @property
    def tokens(self) -> int:
        """Number of calibration tokens."""
        return self.ids.numel()

    @property
    def has_tail(self) -> bool:
        """Whether layers after the blocks are pruned."""
        return bool(self._by_block[None])

    def inside(self, index: int) -> list[str]:
        """Return the parameter names of block ``index``."""
        return block_names(self.prepared.opened.key_of, self.blocks_name, index)

    def outer(self, *, head: bool) -> list[str]:
        """Return the names of the parameters outside the blocks; see :func:`~thanos.model.layers.outer_names`."""
        opened = self.prepared.opened
        return outer_names(opened.meta_model, opened.key_of, self.blocks_name, head=head)

    def outer_bytes(self, *, head: bool) -> int:
        """Return the bytes in memory of the parameters outside the blocks; see :meth:`outer`."""
        return self._in_memory(self.outer(head=head))

    def whole_bytes(self) -> int:
        """Return the bytes of the whole model in memory."""
        return self._in_memory(list(self.prepared.opened.key_of))

    def largest_block(self) -> int:
        """Return the index of the block for the trial: the largest that text reaches, with layers to prune if any has some."""
        reached = self.prepared.picture.reached
        return max(reached, key=lambda i: (bool(self._by_block[i]), self.block_bytes[i]))

    def gathered(self, block: int) -> list[list[LinearLayer]]:
        """Return a block's layers in parts; one pass over the sequences gathers the statistics of one part."""
        layers = self._by_block[block]
        return plan_passes(layers, statistics_budget(self.device)) if layers else []

    def parts(self, block: int | None) -> list[list[LayerWork]]:
        """Return the parts of :meth:`gathered` as layers to solve. For None: the layers after the blocks, one per part."""
        works = {work.name: work for work in self._works(block)}
        if block is None:
            return [[work] for work in works.values()]
        return [[works[layer.name] for layer in layers] for layers in self.gathered(block)]

    def all_parts(self) -> list[list[LayerWork]]:
        """Return the :meth:`parts` of all blocks."""
        return [part for index in range(len(self.block_bytes)) for part in self.parts(index)]

    def observed(self, part: list[LayerWork]) -> float:
        """Return the fraction of the sequences that is run to gather the statistics of a part."""
        return observed_fractions([work.settings for work in part], self.recipe.measure_error, len(self.ids))[0]

    def untouched(self) -> list[str]:
        """Return the checkpoint names of the tensors that are not pruned."""
        key_of = self.prepared.opened.key_of
        pruned = {key_of[layer.weight_name] for layer in self.prepared.layers}
        return [key for key in self.prepared.opened.checkpoint.tensors if key not in pruned]

    def untouched_chunks(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name in the checkpoint, flat chunk) of the tensors that are not pruned."""
        for key in self.untouched():
            for chunk in self.prepared.opened.checkpoint.chunks(key):
                yield key, chunk

    def chunk_bytes(self, keys: Iterable[str]) -> int:
        """Return the bytes of the largest chunk among the named tensors of the checkpoint."""
        tensors = self.prepared.opened.checkpoint.tensors
        return max((tensors[key].chunk_bytes for key in keys), default=0)

    def _works(self, block: int | None) -> list[LayerWork]:
        found, numbers = [], dict[Any, int]()
        for layer in self._by_block[block]:
            # Layers that the trial did not run are assumed to share their input within a module, as in plan_passes.
            key = layer.name if block is None else self.shared.get(inner_name(layer), _module(layer))
            itemsize = self._info(layer.weight_name).dtype.itemsize
            found.append(
                LayerWork(
                    layer.name,
                    *layer.shape,
                    itemsize,
                    self.prepared.layers[layer],
                    numbers.setdefault(key, len(numbers)),
                )
            )
        return found

    def _info(self, parameter: str) -> Any:
        return self.prepared.opened.checkpoint.tensors[self.prepared.opened.key_of[parameter]]

    def _in_memory(self, names: list[str]) -> int:
        itemsize = self.prepared.opened.meta_model.dtype.itemsize
        return sum(self._info(name).numel * itemsize for name in names)


def inner_name(layer: LinearLayer) -> str:
    """Return a layer's name within its block."""
    return layer.name if layer.block is None else layer.name.partition(f".{layer.block}.")[2]


def _module(layer: LinearLayer) -> tuple[str, int]:
    return layer.name.rpartition(".")[0], layer.shape[1]


def phase_bytes(job: Job, trial: BlockTrial, batch: int) -> dict[str, int]:
    """Return the peak bytes of each phase in the device's memory, without the process itself and the hidden states.

    Args:
        job: the work of the run.
        trial: measurements of one block.
        batch: number of sequences in a forward pass.
    """
    on_host = not job.on_cuda
    two = largest_sum(job.block_bytes)
    working = int(trial.working_bytes * batch * job.ids.shape[1] / trial.tokens)
    parts, last = job.all_parts(), job.parts(None)
    hessians = [sum(hessian_bytes(group[0].columns) for group in groups(part).values()) for part in parts]
    tail = job.outer_bytes(head=True) + max(map(solving_bytes, last)) if last else 0
    chunk = job.chunk_bytes(job.prepared.opened.checkpoint.tensors) if on_host else 0
    written = max((work.rows * work.columns * work.itemsize for part in parts for work in part), default=0)
    survey = job.chunk_bytes(job.untouched()) if on_host else 0  # tensors that stay are checked for NaN
    return {
        "load": max(survey, two + 2 * chunk),
        "calibration": job.outer_bytes(head=False) + chunk + working // batch,
        "statistics": max(two + max(hessians, default=0) + working, tail),
        "solve": max(two + max(map(solving_bytes, parts), default=0), tail),
        "write": two // 2 + (written if on_host else 0),
        "propagate": two + working,
        "finish": 0,
    }


def transfer_bytes(job: Job) -> int:
    """Return the bytes of host memory that buffer the weights between the disk and a CUDA device.

    They are one chunk of the checkpoint, and the pinned buffers of the reading and of the writing thread.
    """
    return job.chunk_bytes(job.prepared.opened.checkpoint.tensors) + 2 * STAGING_BYTES


@dataclass(frozen=True, slots=True)
class Pace:
    """Measured rates and times.

    Attributes:
        rates: rates of the device.
        solves: kind of layer → (seconds of a solve without the factor, seconds of the factor).
        look: rate of the NaN check of tensors that are not pruned, in bytes/s.
        write: seconds per byte written to the disk.
        checksum: seconds per byte of a checksum.
        load: seconds to open the model.
        calibration: seconds to build the calibration windows.
    """

    rates: Rates
    solves: dict[Any, tuple[float, float]]
    look: float
    write: float
    checksum: float
    load: float
    calibration: float


def phase_seconds(job: Job, trial: BlockTrial, pace: Pace, batch: int) -> dict[str, float]:
    """Return the seconds of each phase.

    Args:
        job: the work of the run.
        trial: measurements of one block. Other blocks are scaled by their bytes.
        pace: measured rates and times.
        batch: number of sequences in a forward pass.
    """
    tensors, largest = job.prepared.opened.checkpoint.tensors, max(1, *job.block_bytes)
    untouched = sum(tensors[key].nbytes for key in job.untouched())
    pruned = sum(info.nbytes for info in tensors.values()) - untouched
    observe = job.tokens * trial.observe_seconds
    # All batches but the first end before the last layer's product.
    observe -= max(0, job.tokens - batch * job.ids.shape[1]) * trial.spared_seconds
    statistics, solve, propagate, busy = 0.0, 0.0, 0.0, []
    for index, size in enumerate(job.block_bytes):
        parts, share = job.parts(index), size / largest
        is_read = index + 1 < len(job.block_bytes) or job.has_tail
        spent = (
            sum(job.observed(part) for part in parts) * share * observe,
            sum(_solve_seconds(part, pace) for part in parts),
            share * job.tokens * trial.run_seconds if is_read else 0.0,
        )
        statistics, solve, propagate = statistics + spent[0], solve + spent[1], propagate + spent[2]
        busy.append(sum(spent))
    for part in job.parts(None):
        solve += _solve_seconds(part, pace)
        statistics += (
            job.observed(part) * sum(2.0 * job.tokens * work.columns**2 for work in part) / pace.rates.gram_flops
        )
    # A block is read during the work on the previous one. The loop waits only for the part of the reading that takes longer.
    reading = [size / trial.read_rate for size in job.block_bytes]
    waiting = reading[0] + sum(max(0.0, read - work) for read, work in zip(reading[1:], busy, strict=False))
    record = job.outer_bytes(head=False) / trial.read_rate + len(job.ids) * trial.record_seconds
    return {
        "load": pace.load + untouched / pace.look + waiting,
        "calibration": _calibration_seconds(job, pace) + record,
        "statistics": statistics,
        "solve": solve,
        "write": pruned * (pace.write + pace.checksum),
        "propagate": propagate,
        "finish": untouched * pace.write,
    }


def _calibration_seconds(job: Job, pace: Pace) -> float:
    """Return the seconds to build the calibration windows: measured, or estimated for text that the model generates.

    The estimate is that each generated position reads all weights from memory once per batch.
    """
    if job.recipe.calibration != "self":
        return pace.calibration
    batches = math.ceil(len(job.ids) / _GENERATED_TOGETHER)
    return batches * job.ids.shape[1] * job.whole_bytes() / pace.rates.memory_bytes


def _solve_seconds(part: list[LayerWork], pace: Pace) -> float:
    factors = (max(pace.solves[work.kind][1] for work in group) for group in groups(part).values())
    return sum(pace.solves[work.kind][0] for work in part) + sum(factors)
