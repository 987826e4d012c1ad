"""The decoder blocks to remove, chosen one by one: each time the block whose removal changes the model's outputs least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

SEQUENCES = 8
"""Number of calibration sequences on which the removals are measured."""

CANDIDATES = 8
"""Number of blocks that are measured again after a removal: those with the least effect in their last measurement."""

Measure = Callable[[Sequence[int], Sequence[int]], dict[int, float]]
"""Function of the removed blocks and of the candidates, both ascending. It returns candidate → effect on the outputs."""


def chosen_blocks(blocks: Sequence[int], number: int, measure: Measure) -> dict[str, Any]:
    """Return the record of the blocks to remove, with the measurements.

    The first block is never removed, since no block before it could be fitted to its outputs.

    Args:
        blocks: indices of the model's blocks, ascending.
        number: number of blocks to remove, less than all.
        measure: see :data:`Measure`.
    """
    gone, known, rounds = list[int](), dict[int, float](), list[dict[str, Any]]()
    while len(gone) < number:
        left = [block for block in blocks[1:] if block not in gone]
        nearest = sorted(left, key=lambda block: (known.get(block, 0.0), block))[: CANDIDATES if gone else None]
        found = measure(sorted(gone), sorted(nearest))
        known |= found
        gone.append(min(found, key=lambda block: (found[block], block)))
        rounds.append({"removed": gone[-1], "divergence": {str(block): found[block] for block in sorted(found)}})
    return {"dropped": sorted(gone), "rounds": rounds}


@dataclass(frozen=True, slots=True)
class Work:
    """The work of :func:`chosen_blocks`.

    Attributes:
        passes: passes over the model's blocks.
        forwards: forward passes of one block on all sequences of one stream.
        comparisons: comparisons of one stream with the dense model.
        streams: largest number of streams at the same time.
    """

    passes: int
    forwards: int
    comparisons: int
    streams: int


def work_of(blocks: int, number: int) -> Work:
    """Return the work for removing ``number`` of ``blocks`` blocks, if the candidates are evenly spaced in depth."""
    forwards = comparisons = 0
    for gone in range(number):
        left = blocks - gone
        candidates = min(left - 1, CANDIDATES) if gone else left - 1
        comparisons += candidates
        forwards += candidates * (left - 2) // 2
    return Work(number, forwards, comparisons, blocks - 1)
