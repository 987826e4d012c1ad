"""The cost of the passes before the loop, from the trial of one block of each kind."""

from __future__ import annotations

from collections.abc import Sequence

from thanos.engine.activations import choose_tier
from thanos.planning.kinds import Amount, Job, Kind, block_seconds
from thanos.run.allocation import sequences_of
from thanos.run.block_choice import work_of


def allocation_seconds(job: Job, kinds: list[Kind]) -> float:
    """Return the seconds of the pass; if blocks are removed, of all passes that choose them."""
    cutting = job.prepared.cutting
    few = Amount(min(sequences_of(cutting), job.samples))
    spent = block_seconds(job, kinds, lambda _: few)
    if cutting is None or not cutting.drops:
        return sum(spent.values())
    blocks = len(job.prepared.data_flow.reached)
    work = work_of(blocks, cutting.drops)
    # The trial ran one stream through each block, and compared the outputs of two.
    shares = {"statistics": work.forwards / blocks, "dense": (work.comparisons + work.passes) / (2 * blocks)}
    return sum(value * shares.get(name, work.passes) for name, value in spent.items())


def stream_bytes(job: Job, kinds: Sequence[Kind]) -> dict[str, int]:
    """Return storage tier → bytes of the streams of the passes that choose blocks to remove; empty if none are removed."""
    cutting = job.prepared.cutting
    if cutting is None or not cutting.drops:
        return {}
    sample, sequences = kinds[0].tries[0][0], min(sequences_of(cutting), job.samples)
    streams = 1 + work_of(len(job.prepared.data_flow.reached), cutting.drops).streams
    needed = sample.state_bytes // sample.buffers * sequences * streams
    return {choose_tier(needed, job.device, job.folder, job.activations): needed}
