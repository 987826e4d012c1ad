"""A trial of a run: the engine and its stages work on single blocks and few sequences, with the model's weights.

The trial runs the code that prunes, so it covers every stage that the recipe lists. A tried block runs twice, on few and on
more sequences. The difference gives the cost per sequence; the rest does not depend on their number. If sequences are held out,
a third run gives the cost of one. Output goes to a file without a name, which the system deletes when it is closed.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import count

import torch

from thanos.engine.activations import choose_tier, has_spare_room
from thanos.engine.block_runner import most_sequences
from thanos.engine.records import BlockRecord
from thanos.engine.stages.base import BlockStage
from thanos.engine.stages.effects import EffectStage
from thanos.engine.stages.measure import MeasureStage
from thanos.engine.stages.prune import sampled_sequences
from thanos.engine.tuning_passes import BATCH
from thanos.model.layers import LinearLayer
from thanos.planning.kinds import Amount, Job, Kind, Sample
from thanos.planning.scratch import Scratch, TrialMeter, copy_seconds
from thanos.recipe import LayerRecipe
from thanos.recipe.repair import WITHOUT_GENERATED
from thanos.run.allocation import measured_layers, sequences_of
from thanos.run.engine_setup import build_engine
from thanos.system.memory import free_device_bytes, release_free_heap

SECONDS = 8.0
"""Seconds after which no further block is tried. Each kind of block is tried once in any case."""

EPOCHS = 1
"""Epochs of the tuning of a tried block. Its cost grows with the number of passes over the sequences."""

_ALLOCATION_TRIED = 4
"""Sequences of the smaller of the two samples of the pass that chooses sparsities."""

_GOLDEN = 0.618034
"""The golden ratio less 1. The fractional parts of its multiples are spread evenly, so the tried blocks lie at all depths."""


@dataclass(frozen=True, slots=True)
class Trial:
    """The result of a trial.

    Attributes:
        kinds: the kinds of blocks, with their samples.
        once: phase → additional seconds of the first block, in which threads start and kernels are compiled.
        batch: number of sequences in a forward pass of the run.
        tier: storage tier of the hidden states of the pruned model in the run.
        states: storage tier → bytes of hidden states, of all sequences and streams.
        branches: storage tier → bytes of the inputs of branches that are kept in addition.
        copy: seconds per byte of a tensor that is copied from the input to the output.
        allocation: the kinds of blocks of the pass that chooses sparsities, with their samples; empty without the pass.
    """

    kinds: list[Kind]
    once: dict[str, float]
    batch: int
    tier: str
    states: dict[str, int]
    branches: dict[str, int]
    copy: float
    allocation: list[Kind] = field(default_factory=list)


def run_trial(job: Job) -> Trial:
    """Try blocks of each kind."""
    kinds, cuda = job.kinds(), job.device.type == "cuda"
    heaviest = max((kind.blocks[0] for kind in kinds if kind.blocks[0] is not None), key=job.block_bytes)
    # On CUDA every layer, since its kernels are compiled. On the CPU one small layer, to start the threads.
    layers = {layer: settings for layer, settings in job.prepared.layers.items() if layer.block == heaviest}
    some = layers if cuda else dict(sorted(layers.items(), key=lambda item: item[0].shape)[:1])
    with closing(Scratch(job.folder)) as scratch:
        least = Amount(1, min(1, job.held_out), min(EPOCHS, job.amount(heaviest).epochs))
        cold, warm = (_measure(job, scratch, heaviest, least, None, job.activations, some) for _ in range(2))
        once = {phase: max(0.0, seconds - warm.seconds.get(phase, 0.0)) for phase, seconds in cold.seconds.items()}
        tier, states = _tiers(job, warm)
        batch = most_sequences(job.samples, job.ids.shape[1], job.device)
        if cold.fits is not None:  # measured without the hidden states of all sequences
            left = 1 - states.get("device", 0) / free_device_bytes(job.device)
            batch = max(1, min(batch, int(left * cold.fits)))
        each = sum(warm.busy.get(phase, 0.0) for phase in warm.over_sequences - {"calibration"})
        each /= least.sequences * (1 if cuda else torch.get_num_threads())
        size = min(batch, int(SECONDS / (8 * len(kinds) * max(1e-4, each))))
        size = max(size, math.ceil(batch / 4))  # memory is not extrapolated to much larger batches
        began = time.perf_counter()
        for done in count(1):
            for kind in kinds:
                _try(job, scratch, kind, done, _amounts(job, kind, size, batch), tier)
            spent = time.perf_counter() - began
            if spent + spent / done > SECONDS or done >= max(len(kind.blocks) for kind in kinds):
                break
        branches = _branches(job, kinds, tier, states)
        allocation = _try_allocation(job, scratch, tier)
        return Trial(kinds, once, batch, tier, states, branches, copy_seconds(job, scratch), allocation)


def _tiers(job: Job, sample: Sample) -> tuple[str, dict[str, int]]:
    """Return the storage tier of the pruned stream in the run, and tier → bytes of all streams."""
    each, tiers, states = sample.state_bytes * job.samples // sample.buffers, list[str](), dict[str, int]()
    for _ in range(sample.buffers):
        tiers.append(choose_tier(each, job.device, job.folder, job.activations, states))
        states[tiers[-1]] = states.get(tiers[-1], 0) + each
    return tiers[0], states


def _branches(job: Job, kinds: Sequence[Kind], tier: str, states: Mapping[str, int]) -> dict[str, int]:
    """Return storage tier → bytes of the inputs of branches that a run keeps; see :mod:`thanos.engine.branches`."""
    samples, kept = [sample for kind in kinds for tried in kind.tries for sample in tried], 0
    for size in max((sample.branch_bytes for sample in samples), key=sum, default=[]):
        if tier != "disk" and has_spare_room(tier, size * job.samples, job.device, states.get(tier, 0) + kept):
            kept += size * job.samples
    return {tier: kept} if kept else {}


def _amounts(job: Job, kind: Kind, size: int, batch: int) -> list[tuple[Amount, int]]:
    """Return the amounts of work with which a block of a kind is tried, each with its batch size; one if the run is as small.

    ``size`` is the number of sequences of the first amount, ``batch`` the largest batch size.
    """
    whole = job.amount(kind.blocks[0])
    held_out, epochs = min(1, whole.held_out), min(EPOCHS, whole.epochs)
    larger = min(batch, 2 * size)
    few = min(whole.training, max(size, sampled_sequences(job.prepared.layers.values(), job.recipe.measure_error)))
    more = few + larger
    if epochs:  # whole steps of the tuning, since their memory is not extrapolated
        more = math.ceil(more / BATCH) * BATCH
    more = min(whole.training, more)
    amounts = [(Amount(few, held_out, epochs), size)]
    if more > few:
        amounts.append((Amount(more, held_out, epochs), larger))
    if whole.held_out > held_out:
        amounts.append((Amount(few, 2, epochs), size))
    return amounts


def _try(
    job: Job,
    scratch: Scratch,
    kind: Kind,
    done: int,
    amounts: Sequence[tuple[Amount, int]],
    tier: str,
    stages_of: Callable[[int], Sequence[BlockStage]] | None = None,
) -> None:
    """Try one more block of a kind, and add its samples. ``done``, the number of blocks tried so far and this one, selects it.

    ``stages_of`` returns the stages of a block; None for those of the recipe.
    """
    usual = kind.blocks[:-1] or kind.blocks  # the outputs of the last block may not be needed
    block = usual[int(len(usual) * (done * _GOLDEN % 1))]

    def stages() -> Sequence[BlockStage] | None:
        return None if stages_of is None or block is None else stages_of(block)

    kind.tries.append([_measure(job, scratch, block, *one, tier, stages=stages()) for one in amounts])


def _try_allocation(job: Job, scratch: Scratch, tier: str) -> list[Kind]:
    """Try the pass before the loop on one block of each kind; return these kinds, or an empty list without such a pass."""
    layers, cutting = measured_layers(job.prepared, job.recipe), job.prepared.cutting
    drops = cutting is not None and cutting.drops > 0
    if not layers and not drops:
        return []
    measuring = replace(job, prepared=replace(job.prepared, layers=layers))
    kinds, most = measuring.kinds(), min(sequences_of(cutting), job.samples)
    few, more = min(most, _ALLOCATION_TRIED), min(most, 2 * _ALLOCATION_TRIED)

    def stages(block: int) -> Sequence[BlockStage]:
        return (EffectStage([block], [block - 1]) if drops else MeasureStage(),)  # one stream runs through the block

    for kind in kinds:
        amounts = [(Amount(number), number) for number in dict.fromkeys((few, more))]
        _try(measuring, scratch, kind, 1, amounts, tier, stages)
    return kinds


def _measure(
    job: Job,
    scratch: Scratch,
    block: int | None,
    amount: Amount,
    batch: int | None,
    tier: str,
    layers: Mapping[LinearLayer, LayerRecipe] | None = None,
    stages: Sequence[BlockStage] | None = None,
) -> Sample:
    """Run the engine on one block and the first sequences; ``block`` None stands for the layers after the blocks.

    ``batch`` None chooses the batch size as a run does. ``layers`` are the layers to prune, by default all. ``stages`` are
    the stages to run, by default the recipe's.
    """
    gc.collect()
    release_free_heap()
    scratch.meter = meter = TrialMeter(job.device)
    given = job.prepared.layers if layers is None else layers
    tried = {
        layer: replace(settings, tune=amount.epochs) if settings.repair.tune > amount.epochs else settings
        for layer, settings in given.items()
    }
    engine = build_engine(
        replace(job.prepared, layers=tried),
        replace(job.recipe, **WITHOUT_GENERATED, **({"held_out": amount.held_out} if amount.held_out else {})),
        job.ids[: amount.sequences],
        job.device,
        job.folder,
        activations=tier,
        writer=scratch,  # type: ignore[arg-type]
        journal=scratch,
        meter=meter,
        stages=stages,
    )
    meter.streams = runner = engine.inputs.runner
    runner.batch, runner.planned_samples = batch, job.samples
    over = {"calibration", "choose"}  # these phases report no progress
    # If blocks store values for later ones, the blocks before run too, but are not counted.
    before = [i for i in job.prepared.data_flow.reached if job.prepared.data_flow.shares and i < (block or 0)]
    scratch.finished = {i: BlockRecord(block=i, layers=[], tensors={}, batch=batch) for i in before}
    for event in engine.run([*before, block]):
        if event.replayed:
            meter.forget("load", "propagate")
        elif event.tokens:
            over.add(event.phase)
    seconds = {phase: record.seconds for phase, record in meter.records().items()}
    return Sample(
        amount=amount,
        batch=min(amount.sequences, runner.batch or 1),
        seconds=seconds,
        busy=seconds if job.device.type == "cuda" else meter.busy,
        peaks=meter.growth,
        over_sequences=frozenset(over),
        state_bytes=runner.state_bytes // amount.sequences,
        buffers=runner.buffers,
        branch_bytes=[size // amount.sequences for size in runner.branch_bytes],
        fits=runner.fits,
        with_branches=frozenset(meter.with_branches),
    )
