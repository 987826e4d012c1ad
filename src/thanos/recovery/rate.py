"""The learning rate of a recovery: the largest one, and its course over the steps."""

from __future__ import annotations

import math


def rate_for(divergence: float, size: float) -> float:
    """Return the largest learning rate for a pruned model, with two digits.

    It is ``size`` · 3.2e-3 · ``divergence``^0.8, but at least 1e-4 and at most 4e-3 of ``size``. AdamW changes a weight by
    about the rate in each step, whatever its size; so the rate is relative to the weights. With a larger loss they have to
    change more. The constants are fitted to the best rates tried: 2e-4 to 3e-4 at 50 %, 4e-4 at 2:4 and 6e-4 at 70 % on
    SmolLM2-135M (size 0.27; divergence 0.22, 0.40 and 0.66), and 1e-5 at 16:32 on Qwen2.5-Coder-0.5B (size 0.025; divergence
    0.08), where the loss rises with 1e-4.

    Args:
        divergence: KL(dense ‖ pruned) on the held-out sequences before the training, in nats per token. Rounding can make it
            slightly negative, which counts as zero.
        size: root mean square of the non-zero weights of the pruned model's blocks.
    """
    return float(f"{size * min(4e-3, max(1e-4, 3.2e-3 * max(0.0, divergence) ** 0.8)):.1e}")


def one_cycle(step: int, steps: int) -> float:
    """Return the learning rate of a step as a fraction of the largest rate.

    It rises from 1/25 to 1 over the first 30 % of the steps, and falls to 1/250,000 over the rest, both as a cosine (L. Smith,
    arXiv 1708.07120; shape and constants of torch's ``OneCycleLR``). It depends only on the step, so a resumed run needs no
    state.

    Args:
        step: number of finished steps.
        steps: number of all steps.
    """
    top = 0.3 * steps - 1
    if step <= top:
        low, high, part = 1 / 25, 1.0, step / top if top > 0 else 1.0
    else:
        low, high, part = 1.0, 1 / 250_000, min(1.0, (step - top) / max(1e-9, steps - 1 - top))
    return high + (low - high) * (1 + math.cos(math.pi * part)) / 2
