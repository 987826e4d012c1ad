"""Tuning a pruned block with its zeros fixed, towards the outputs of the dense block.

It minimises ‖F(X̂; θ ∘ mask) − F*(X*)‖² over the weights that pruning kept, the gains and the biases. F is the pruned block, X̂
its inputs in the model pruned so far. F* is the dense block, X* its inputs in the dense model. So the tuning also repairs
errors of earlier blocks. EBFT (arXiv 2402.12419) tunes blocks too, each towards the dense block's outputs.

This module does not depend on models: a block is a function of its parameters and inputs.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from thanos.engine.distributed import SINGLE, World
from thanos.engine.tuned_parameters import Masters, held
from thanos.engine.tuning_passes import BATCH, TuningPasses, Work
from thanos.engine.tuning_record import TuningRecord

BETAS = (0.9, 0.95)
"""Decay rates of Adam's moments."""

RISE, FIRST_RATE = 0.3, 0.04
"""One-cycle schedule: fraction of the steps with a rising rate, and the first rate as a fraction of the highest."""


@dataclass(frozen=True, slots=True)
class Tuned:
    """Result of :func:`tune`.

    Attributes:
        values: parameter name → new value in its stored dtype; empty if the weights before tuning are kept.
        record: the record, without the block's index.
    """

    values: dict[str, Tensor]
    record: TuningRecord


@dataclass(frozen=True, slots=True)
class TuningProgress:
    """Progress of :func:`tune`.

    Attributes:
        done: number of sequences trained on so far, over all epochs and processes.
        total: the same at the end.
        loss: mean error of the batches in the last finished epoch; None in the first.
        held_out: least held-out error so far.
    """

    done: int
    total: int
    loss: float | None
    held_out: float


def tune(
    work: Work, *, epochs: int, rate: float, seed: int, world: World = SINGLE
) -> Generator[TuningProgress, None, Tuned]:
    """Tune a block; yield the progress after each step and each epoch.

    After each epoch the held-out sequences are run with the weights rounded to their stored dtypes. The epoch with the least
    error is kept if that error is below the error before tuning. Otherwise the weights before tuning are kept. They are kept
    too, and tuning ends, if the loss of an epoch is not finite.

    The loss is divided by the mean square of the wanted outputs, so that it does not depend on a model's scale. On a CPU the
    same input gives the same bits. A step of several processes is that of one process, up to the order of sums. All processes
    return equal values.

    Args:
        work: the block and its sequences.
        epochs: number of passes over the training sequences.
        rate: highest learning rate, as a fraction of :attr:`~thanos.engine.tuned_parameters.Masters.size`.
        seed: seed of the order of sequences.
        world: the processes that share the work.
    """
    record = TuningRecord(sequences=len(work.training), held_out_sequences=len(work.held_out))
    if not work.tunables or not work.training or not work.held_out:
        return Tuned({}, replace(record, reason="too few sequences" if work.tunables else "there is nothing to tune"))
    passes, sample = TuningPasses(work, world), evenly(work.training, len(work.held_out))
    training, best = passes.measure({}, sample), passes.measure({}, work.held_out).error
    record = replace(record, error_before=training.error, error_after=training.error)
    record = replace(record, held_out_before=best, held_out_after=best)
    if not math.isfinite(training.error) or not math.isfinite(best):
        return Tuned({}, replace(record, reason="the block's outputs, or the wanted ones, are not finite or all zero"))
    if not best:
        return Tuned({}, replace(record, reason="the block's outputs equal the wanted ones already"))
    masters = Masters(work.tunables, BETAS)
    record = replace(record, parameters=masters.free)
    values: dict[str, Tensor] = {}
    generator, done, step = torch.Generator().manual_seed(seed), 0, 0
    for epoch in range(1, epochs + 1):
        batches = shuffled_batches(work.training, BATCH, generator)
        summed = torch.zeros((), dtype=torch.float64, device=work.device)
        for batch, inputs, targets in passes.read(batches):
            loss = passes.gradients(masters, batch, inputs, targets, training.mean_square)
            masters.step(one_cycle(step, epochs * len(batches), rate * masters.size))
            summed += loss.double() * len(batch)  # on the device: a step does not wait for its loss
            step, done = step + 1, done + len(batch)
            yield TuningProgress(done, epochs * len(work.training), record.losses[-1] if record.losses else None, best)
        mean = summed.item() / len(work.training)
        record = replace(record, epochs=epoch, losses=[*record.losses, mean])
        if not math.isfinite(mean):
            reason = f"the loss was not finite in epoch {epoch}"
            kept = replace(record, kept_epoch=0, reason=reason, held_out_unrounded=None)
            return Tuned({}, replace(kept, held_out_after=kept.held_out_before))
        rounded = masters.rounded()
        error = passes.measure(held(work.tunables, rounded), work.held_out).error
        record = replace(record, held_out_errors=[*record.held_out_errors, error])
        if error < best:  # False for NaN
            best, values = error, rounded
            unrounded = passes.measure(masters.leaves, work.held_out, training=True).error
            record = replace(record, kept_epoch=epoch, held_out_after=error, held_out_unrounded=unrounded)
        # Once more, now with the losses of this epoch: after the last one no step would report them.
        yield TuningProgress(done, epochs * len(work.training), mean, best)
    del masters
    if not values:
        return Tuned({}, replace(record, reason="the held-out error did not fall"))
    return Tuned(values, replace(record, error_after=passes.measure(held(work.tunables, values), sample).error))


def one_cycle(step: int, steps: int, highest: float) -> float:
    """Return the learning rate of a step, from 0: it rises along a cosine to ``highest``, then falls along one to almost 0."""
    done = (step + 0.5) / steps
    if done < RISE:
        return highest * (FIRST_RATE + (1 - FIRST_RATE) * (1 - math.cos(math.pi * done / RISE)) / 2)
    return highest * (1 + math.cos(math.pi * (done - RISE) / (1 - RISE))) / 2


def shuffled_batches(positions: Sequence[int], size: int, generator: torch.Generator) -> list[list[int]]:
    """Split positions into as few batches of at most ``size`` as possible, in random order.

    The positions are divided into equal contiguous ranges. Each batch has at most one position of each range. So with several
    processes, which hold contiguous ranges of the sequences, every batch gives each process about the same work, and the
    batches do not depend on the number of processes.
    """
    count = -(-len(positions) // size)
    ranges = -(-len(positions) // count)
    bounds = [len(positions) * index // ranges for index in range(ranges + 1)]
    batches: list[list[int]] = [[] for _ in range(count)]
    for begin, end in pairwise(bounds):
        # A range one shorter than the others leaves out a random batch.
        for batch, offset in zip(batches, torch.randperm(count, generator=generator).tolist(), strict=True):
            if offset < end - begin:
                batch.append(positions[begin + offset])
    return [batch for batch in batches if batch]


def evenly(positions: Sequence[int], count: int) -> list[int]:
    """Return at most ``count`` of the positions, evenly spaced."""
    count = min(count, len(positions))
    return [positions[len(positions) * index // count] for index in range(count)]
