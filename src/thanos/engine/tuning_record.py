"""The record of a block's tuning, for the report and the journal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class TuningRecord:
    """The tuning of one block.

    An error is ‖F(X̂) − F*(X*)‖² / ‖F*(X*)‖² over sequences; with the loss ``token`` it is the mean of the tokens' own errors.
    Unless stated otherwise it is measured with weights in their stored dtype, and the block runs as it does for the next
    block's inputs. The training error is measured on an evenly spaced sample, as large as the held-out set.

    Attributes:
        block: index of the block.
        epochs: number of epochs that ran.
        kept_epoch: epoch whose weights were kept, from 1; 0 if the weights before tuning were kept.
        error_before: error on training sequences before tuning; None if nothing was measured, as for the next three.
        error_after: the same for the weights that were kept.
        held_out_before: error on held-out sequences before tuning.
        held_out_after: the same for the weights that were kept; never above ``held_out_before``.
        held_out_unrounded: held-out error of the weights that were kept before they were rounded, run as in training. The
            difference to ``held_out_after`` is the damage by rounding. None if the weights before tuning were kept.
        sequences: number of training sequences.
        held_out_sequences: number of held-out sequences.
        parameters: number of entries that may change.
        losses: mean error of the batches of each epoch, during the epoch; None in a report if it is not finite.
        held_out_errors: held-out error after each epoch; None likewise.
        reason: why the weights before tuning were kept; empty if they were not.
        zeros_elsewhere: change of the number of zeros in tensors that were not pruned, such as biases.
        seconds: seconds of the stage.
    """

    block: int | None = None
    epochs: int = 0
    kept_epoch: int = 0
    error_before: float | None = None
    error_after: float | None = None
    held_out_before: float | None = None
    held_out_after: float | None = None
    held_out_unrounded: float | None = None
    sequences: int = 0
    held_out_sequences: int = 0
    parameters: int = 0
    losses: list[float | None] = field(default_factory=list)
    held_out_errors: list[float | None] = field(default_factory=list)
    reason: str = ""
    zeros_elsewhere: int = 0
    seconds: float = 0.0


def tuning_line(records: Sequence[TuningRecord], *, has_zeros: bool = True) -> str:
    """Return a sentence about the tuning of all blocks; empty if none was tuned.

    ``has_zeros`` says whether the model has zeros that were kept; a smaller one has none.
    """
    measured = [
        (bool(one.kept_epoch), one.held_out_after / one.held_out_before)
        for one in records
        if one.held_out_before and one.held_out_after is not None
    ]
    if not measured:
        return ""
    # The blocks that were left unchanged do not count in the median: their ratio is 1.
    ratios = sorted(ratio for improved, ratio in measured if improved)
    kept = len(ratios)
    how = " with their zeros fixed," if has_zeros else ""
    if not kept:
        return (
            f"{len(records)} blocks were then tuned{how} towards the dense blocks' outputs; none improved on held-out "
            "sequences, so all were left unchanged"
        )
    text = (
        f"{kept} of {len(records)} blocks {'was' if kept == 1 else 'were'} then tuned{how} towards the dense blocks' outputs; "
        f"in the median of them the error on held-out sequences became {ratios[kept // 2]:.3g} times its former value"
    )
    return text if kept == len(records) else f"{text} (the others did not improve and were left unchanged)"
