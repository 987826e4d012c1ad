"""What the engine tells whoever watches: a stream of small records, from which a display or a log is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Phase = Literal["load", "calibration", "statistics", "solve", "write", "propagate", "evaluate", "finish", "draw"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One step of a run.

    Args:
        kind: ``phase`` (a phase begins), ``progress`` (``done`` of ``total`` units of the phase), ``layer`` (a layer
            was pruned), ``block`` (a block is complete) or ``note`` (a line that a person should read).
        phase: the phase that is running.
        seconds: since the run began.
        block: index of the decoder block, from 0; None outside the blocks.
        blocks: number of decoder blocks.
        layer: full module name, for ``layer``.
        done: units finished in this phase (sequences, layers or tensors).
        total: units in this phase.
        tokens: tokens processed so far in this phase.
        error: relative layer error after compensation, for ``layer``; the mean so far, for ``block``.
        message: for ``note``.
    """

    kind: Literal["phase", "progress", "layer", "block", "note"]
    phase: Phase
    seconds: float = 0.0
    block: int | None = None
    blocks: int = 0
    layer: str = ""
    done: int = 0
    total: int = 0
    tokens: int = 0
    error: float | None = None
    message: str = ""
