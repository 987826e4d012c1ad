"""Display of progress, drawn from events alone: live lines on a terminal, plain lines elsewhere.

The display is a function of the events. So a replay of a log (``events.jsonl``) gives the same plain lines.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TextIO, TypeVar

from thanos.events import Event

E = TypeVar("E")

_LABELS = {
    "load": "load model",
    "calibration": "calibrate",
    "allocate": "measure layers",
    "verify": "check finished blocks",
    "dense": "dense model",
    "statistics": "statistics",
    "choose": "choose dense target",
    "solve": "solve",
    "tune": "tune",
    "write": "write",
    "propagate": "propagate",
    "evaluate": "evaluate",
    "tasks": "score tasks",
    "finish": "finish",
    "draw": "draw figures",
    "train": "train",
}

_WITHIN_BLOCK = {"statistics": (0.0, 0.45), "solve": (0.45, 0.35), "propagate": (0.8, 0.2)}
"""Phase → its start within a block and its length, both as fractions of the block; estimates for a smooth bar."""

_WITHIN_TUNED = {"statistics": (0.0, 0.1), "solve": (0.1, 0.1), "tune": (0.2, 0.75), "propagate": (0.95, 0.05)}
"""The same for blocks that are tuned."""

_PLAIN_SECONDS = 10.0
"""Least seconds between two plain lines of progress."""

_RATE_SECONDS = 0.2
"""Least seconds of a phase before its rate is shown."""

_BAR_CELLS, _LEAST_CELLS = 24, 8


def hush() -> None:
    """Disable the progress bars and advice of transformers and the hub. Their errors are still shown."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # the GGUF reader draws its bar unconditionally
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


class Watcher(Protocol):
    """A function that displays events."""

    def __call__(self, event: Event) -> None:
        """Show one event."""
        ...


@contextmanager
def watch(
    *, quiet: bool = False, silent: bool = False, stream: TextIO | None = None
) -> Iterator[Callable[[Event], None]]:
    """Yield a function that shows events on the standard error; see :func:`shown`. With ``silent`` it shows nothing."""
    if silent:
        yield lambda event: None
        return
    with shown(_live, PlainLines, lambda event: event.kind == "note", quiet=quiet, stream=stream) as show:
        yield show


@contextmanager
def shown(
    live: Callable[[TextIO], AbstractContextManager[Callable[[E], None]]],
    plain: Callable[[TextIO], Callable[[E], None]],
    is_note: Callable[[E], bool],
    *,
    quiet: bool,
    stream: TextIO | None,
) -> Iterator[Callable[[E], None]]:
    """Yield a function that shows events on ``stream`` (default: the standard error).

    It is a live display on a terminal and writes plain lines elsewhere. With ``quiet`` it hides progress: it writes the notes
    alone, each on a plain line, since a person should read them.
    """
    target = stream or sys.stderr
    if quiet:
        show = plain(target)
        yield lambda event: show(event) if is_note(event) else None
    elif target.isatty():
        with live(target) as show:
            yield show
    else:
        yield plain(target)


class Position:
    """The position of a run, derived from its events so far.

    Attributes:
        event: last event that is not a note; None at first.
        error: mean relative layer error of the finished blocks; before the first block is finished, that of the last layer.
        block_error: the error of the present block before the first stage and after each, in words; empty if it is unknown.
        held_out: last loss on held-out sequences.
        rate: tokens a second of the current phase; None if it has none, or has only just begun.
        tuning: last event of the present block's tuning that has its losses; None if there is none.
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
        if event.block != self._block:
            self._block, self._block_began, self.block_error = event.block, event.seconds, ""
            self.tuning = None
        self._tunes |= event.phase == "tune"
        if event.held_out is not None:
            self.tuning = event
        if event.kind == "block" and not event.replayed:
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
        """The finished fraction of all blocks, or outside the blocks of the phase; None if unknown."""
        event = self.event
        if event is None:
            return None
        inside = event.done / event.total if event.total else 0.0
        if event.block is None:
            return inside if event.total else None
        begin, share = (_WITHIN_TUNED if self._tunes else _WITHIN_BLOCK).get(event.phase, (0.0, 0.0))
        return (event.block + (1.0 if event.kind == "block" else begin + share * inside)) / event.blocks


class PlainLines:
    """Writes a line for each phase outside the blocks, each finished block and each note, and sometimes for progress.

    Args:
        stream: stream for the lines.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._position = Position()
        self._last = 0.0
        self._phase = ""

    def __call__(self, event: Event) -> None:
        """Write a line for an event, unless it is progress too soon after the last line."""
        self._position(event)
        if event.kind == "note":
            self._write(event, f"note: {event.message}")
        elif event.kind == "block" and event.block is not None:
            what = ["outputs computed again"] if event.replayed else []
            what += [] if event.error is None else [f"mean layer error {event.error:.4g}"]
            what += [self._position.block_error] if self._position.block_error else []
            what += [] if self._position.tuning is None else [_losses(self._position.tuning)]
            left = self._position.remaining(event.seconds)
            what += [_memory(event), *([f"{_clock(left)} left"] if left else [])]
            self._write(event, f"block {event.block + 1} of {event.blocks}, {', '.join(what)}")
        elif event.kind == "epoch":
            what = [] if event.loss is None else [f"loss {event.loss:.4g}"]
            what.append("held-out loss " + ("not a number" if event.held_out is None else f"{event.held_out:.4g}"))
            left = self._position.remaining(event.seconds)
            what += [_memory(event), *([f"{_clock(left)} left"] if left else [])]
            where = f"epoch {event.done} of {event.total}" if event.done else "before the first epoch"
            self._write(event, f"{where}, {', '.join(what)}")
        elif event.kind == "phase" and event.block is None and event.phase != self._phase:
            self._phase = event.phase
            self._write(event, _LABELS[event.phase])
        elif event.kind == "progress" and event.seconds - self._last >= _PLAIN_SECONDS:
            where = "" if event.block is None else f"block {event.block + 1} of {event.blocks}, "
            rate = "" if self._position.rate is None else f", {self._position.rate:,.0f} tokens/s"
            losses = _losses(event) if event.held_out is not None else _training_loss(event)
            what = f"{where}{_LABELS[event.phase]} {event.done} of {event.total}{rate}"
            self._write(event, ", ".join(part for part in (what, losses) if part))

    def _write(self, event: Event, text: str) -> None:
        self._last = event.seconds
        self._stream.write(f"[{_clock(event.seconds)}] {text}\n")
        self._stream.flush()


def live_lines(position: Position, now: float, width: int = 120) -> tuple[str, str]:
    """Return the two lines of the live display: the position of the run, and its time and memory.

    Args:
        position: position of the run.
        now: seconds since the run began.
        width: width of the terminal in characters; on a narrow one the bar is shortened first.
    """
    event = position.event
    if event is None:
        return "starting", ""
    where = _LABELS[event.phase]
    if event.block is not None:
        where = f"block {event.block + 1}/{event.blocks} {where}"
    layer = event.layer.rsplit(".", 1)[-1]
    counted = f"{event.done} of {event.total}" if event.total and event.kind != "block" else ""
    rate = "" if position.rate is None else f"{position.rate:,.0f} tokens/s"
    error = "" if position.error is None else f"error {position.error:.4g}"
    losses = "" if position.tuning is None else _losses(position.tuning)
    held_out = "" if position.held_out is None else f"held-out loss {position.held_out:.4g}"
    losses += _training_loss(event)
    parts = (where, layer, counted, rate, error, position.block_error, losses, held_out)
    head = " · ".join(part for part in parts if part)
    done = position.done
    left = position.remaining(now)
    times = f"{_clock(now)} elapsed" + ("" if left is None else f", {_clock(left)} left")
    figures = f"{times} · {_memory(event)}"
    cells = min(_BAR_CELLS, width - len(figures) - 1)
    if cells < _LEAST_CELLS:
        return head, figures
    filled = round(cells * (done or 0.0))
    return head, f"{'━' * filled}{'╌' * (cells - filled)} {figures}"


@contextmanager
def _live(stream: TextIO) -> Iterator[Callable[[Event], None]]:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    position, console = Position(), Console(file=stream)
    last = [0.0, time.monotonic()]  # seconds of the last event, and the clock then, to interpolate between events

    def draw() -> Any:
        # On a narrow terminal lines are wrapped, so that no number is cut off.
        return Group(*map(Text, live_lines(position, last[0] + time.monotonic() - last[1], console.width)))

    with Live(get_renderable=draw, console=console, refresh_per_second=4, transient=True) as live:

        def show(event: Event) -> None:
            position(event)
            last[:] = event.seconds, time.monotonic()
            if event.kind == "note":
                live.console.print(f"note: {event.message}", markup=False, highlight=False)
            elif event.kind == "block":
                live.refresh()  # show every block, even if blocks finish faster than the display refreshes

        yield show


def _training_loss(event: Event) -> str:
    """Return the loss of a recovery's step; empty for other events."""
    return f"loss {event.loss:.4g}" if event.phase == "train" and event.loss is not None else ""


def _losses(event: Event) -> str:
    """Return the losses of a block's tuning."""
    loss = "" if event.loss is None else f"tuning loss {event.loss:.4g}, "
    before = "" if event.held_out_before is None else f"{event.held_out_before:.4g} → "
    return f"{loss}held-out error {before}{event.held_out:.4g}"


def _memory(event: Event) -> str:
    host = f"host {_size(event.host_bytes)}, peak {_size(event.host_peak_bytes)}"
    if event.device_bytes is None or event.device_peak_bytes is None:
        return host
    return f"{host}, device {_size(event.device_bytes)}, peak {_size(event.device_peak_bytes)}"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
