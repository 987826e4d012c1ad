"""The work of the tuning of a block, for forecasts."""

from __future__ import annotations

GRADIENT_PASSES = 3.0
"""Cost of a pass with gradients, in passes without: the forward pass, and two products in place of each of its own."""


def tuning_passes(epochs: int, samples: int, held_out: int) -> float:
    """Return the cost of a block's tuning, in passes of the block without gradients over one sequence.

    An epoch trains on ``samples - held_out`` sequences and measures the held-out ones twice: rounded, and not. Before and after
    come passes over the held-out sequences and over as many others.
    """
    training = samples - held_out
    return epochs * (GRADIENT_PASSES * training + 2 * held_out) + held_out + 2 * min(held_out, training)
