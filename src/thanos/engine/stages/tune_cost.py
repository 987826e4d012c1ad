"""The work of the tuning of a block, for forecasts."""

from __future__ import annotations

GRADIENT_PASSES = 3.0
"""Cost of a pass with gradients, in passes without: the backward pass has two products for each of the forward pass."""


def tuning_passes(epochs: int, samples: int, held_out: int) -> float:
    """Return the cost of a block's tuning, in passes of the block without gradients over one sequence.

    An epoch trains on ``samples - held_out`` sequences and measures the held-out ones at most twice: with rounded weights, and
    if these are the best so far, with unrounded ones. Before training, the held-out sequences and as many training sequences
    are run; after it, these training sequences again. All these measurements are counted.
    """
    training = samples - held_out
    return epochs * (GRADIENT_PASSES * training + 2 * held_out) + held_out + 2 * min(held_out, training)
