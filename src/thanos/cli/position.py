"""The position of a run: the current block and phase, rates, errors and the time left, derived from its events."""

from __future__ import annotations

from thanos.events import Event

_WITHIN_BLOCK = {"statistics": (0.0, 0.45), "solve": (0.45, 0.35), "propagate": (0.8, 0.2)}
"""Phase → its start within a block and its length, both as fractions of the block; estimates for a smooth bar."""

_WITHIN_TUNED = {"statistics": (0.0, 0.1), "solve": (0.1, 0.1), "tune": (0.2, 0.75), "propagate": (0.95, 0.05)}
"""The same for blocks that are tuned."""

_RATE_SECONDS = 0.2
"""Least seconds of a phase before its rate is shown."""


class Position:
    """The position of a run, derived from its events so far.

    Attributes:
        event: last event that is not a note; None at first.
        error: mean relative layer error of the finished blocks; before the first block is finished, that of the last layer.
        block_error: the error of the current block before the first stage and after each, in words; empty if it is unknown.
        held_out: last loss on held-out sequences.
        rate: tokens a second of the current phase; None if it has none, or has only just begun.
        tuning: last event of the current block's tuning that has its losses; None if there is none.
    """

    def __init__(self) -> None:
        self.event: Event | None = None
        self.error: float | None = None
        self.block_error = ""
        self.held_out: float | None = None
        self.rate: float | None = None
        self.tuning: Event | None = None
        self._tunes = False
        self._phase: tuple[int | None, str] | None = None
        self._phase_began = self._block_began = 0.0
        self._done_before = 0
        self._block: int | None = None
        self._pruned_seconds, self._pruned = 0.0, 0

    def __call__(self, event: Event) -> None:
        """Update the position with one event."""
        if event.kind == "note":
            return
        if event.kind == "epoch":  # counts epochs, and the phase counts steps
            self.held_out = event.held_out
            return
        if event.kind == "phase":
            self._done_before = event.done
        if event.kind == "phase" or (event.block, event.phase) != self._phase:
            self._phase, self._phase_began = (event.block, event.phase), event.seconds
        begins = event.block != self._block
        if begins:
            self._block, self._block_began, self.block_error = event.block, event.seconds, ""
            self.tuning = None
        self._tunes |= event.phase == "tune"
        if event.held_out is not None:
            self.tuning = event
        if event.kind == "block" and not event.replayed and not begins:  # a block that does not run has no other event
            self._pruned_seconds += event.seconds - self._block_began
            self._pruned += 1
        if event.kind == "stage":
            error = "unknown" if event.error is None else f"{event.error:.4g}"
            self.block_error += f" → {error} ({event.stage})" if self.block_error else f"block error {error}"
        elif event.error is not None and (event.kind == "block" or not self._pruned):
            self.error = event.error
        spent = event.seconds - self._phase_began
        self.rate = event.tokens / spent if event.tokens and spent > _RATE_SECONDS else None
        self.event = event

    def remaining(self, now: float) -> float | None:
        """Return the estimated seconds left at ``now``, both in seconds since the run began; None if unknown.

        Within the blocks it is an estimate for all remaining blocks, from the mean time of those pruned in this run. Outside
        of them it is an estimate for the phase.
        """
        event = self.event
        if event is None or (event.block is not None and not self._pruned):
            return None
        if event.block is None:
            spent = event.seconds - self._phase_began
            done = event.done - self._done_before
            return spent / done * (event.total - event.done) if done > 0 and event.total else None
        mean = self._pruned_seconds / self._pruned
        within = 0.0 if event.kind == "block" else max(0.0, mean - (now - self._block_began))
        return within + mean * (event.blocks - event.block - 1)

    @property
    def done(self) -> float | None:
        """The finished fraction of all blocks; outside the blocks, that of the phase. None if unknown."""
        event = self.event
        if event is None:
            return None
        inside = event.done / event.total if event.total else 0.0
        if event.block is None:
            return inside if event.total else None
        begin, share = (_WITHIN_TUNED if self._tunes else _WITHIN_BLOCK).get(event.phase, (0.0, 0.0))
        return (event.block + (1.0 if event.kind == "block" else begin + share * inside)) / event.blocks
