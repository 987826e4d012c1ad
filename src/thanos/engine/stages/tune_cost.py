"""Memory and time of the tuning of a block, for forecasts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from thanos.engine.tuning_passes import BATCH, FREE_SHARE

ENTRY_BYTES = 4 + 4 + 4 + 4 + 1
"""Bytes for each entry of the tuned parameters: float32 copy, gradient, two moments of Adam, and the mask of zeros."""

GRADIENT_PASSES = 3.0
"""Cost of a pass with gradients, in passes without: the forward pass, and two products in place of each of its own."""


@dataclass(frozen=True, slots=True)
class TuningSize:
    """Numbers on which the cost of tuning depends.

    Attributes:
        entries: number of entries of the block's parameters.
        stored: bytes of a stored entry.
        held: bytes of an entry in the model's dtype.
        tokens: T, tokens of a sequence.
        width: d, entries of a hidden state.
        cuda: whether the block runs on CUDA.
    """

    entries: int
    stored: int
    held: int
    tokens: int
    width: int
    cuda: bool


def tuning_bytes(size: TuningSize) -> int:
    """Return the peak bytes of a block's tuning without the activations of its passes.

    They are, in addition to the block's own parameters: what the optimiser holds, the best weights so far and those of the last
    epoch (rounded, and in the model's dtype), and two batches of inputs and of wanted outputs (one is read ahead), the present
    one in float32 too.
    """
    weights = ENTRY_BYTES + 2 * size.stored + (size.held if size.held != size.stored else 0)
    if size.cuda:
        weights += 2  # autocast's copy of the weights in 16 bits
    return size.entries * weights + BATCH * size.tokens * size.width * (4 * size.held + 3 * 4)


def tuning_activation_bytes(sequence_bytes: int, free_bytes: int) -> int:
    """Return the bytes of the activations of a pass with gradients on CUDA.

    Args:
        sequence_bytes: peak bytes of a pass with gradients on one sequence.
        free_bytes: free bytes of the device at that time.
    """
    return max(1, min(BATCH, int(FREE_SHARE * free_bytes / max(1, sequence_bytes)))) * sequence_bytes


def tuning_passes(epochs: int, samples: int, held_out: int) -> float:
    """Return the cost of a block's tuning, in passes of the block without gradients over one sequence.

    An epoch trains on ``samples - held_out`` sequences and measures the held-out ones twice: rounded, and not. Before and after
    come passes over the held-out sequences and over as many others.
    """
    training = samples - held_out
    return epochs * (GRADIENT_PASSES * training + 2 * held_out) + held_out + 2 * min(held_out, training)


def tuning_steps(epochs: int, samples: int, held_out: int) -> int:
    """Return the number of steps of a block's tuning. Each reads and writes all that the optimiser holds."""
    return epochs * math.ceil((samples - held_out) / BATCH)
