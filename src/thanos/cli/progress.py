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
from typing import Any, TextIO, TypeVar

from thanos.cli.position import Position
from thanos.events import Event
from thanos.system.library_warnings import print_in_one_line

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
    "generate": "generate text",
    "finish": "finish",
    "draw": "draw figures",
    "compile": "try the compiler",
    "train": "train",
}

_PLAIN_SECONDS = 10.0
"""Least seconds between two plain lines of progress."""

_BAR_CELLS, _LEAST_CELLS = 24, 8


def hush() -> None:
    """Disable the progress bars and advice of transformers and the hub. Their errors are still shown."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # the GGUF reader draws its bar unconditionally
    for name in ("lm_eval", "torchao", "torch.utils._pytree"):  # torchao warns of kernels for other devices
        logging.getLogger(name).setLevel(logging.ERROR)
    print_in_one_line()
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


class Watcher:
    """A function that displays events and keeps the messages of the notes that it displayed.

    Args:
        show: displays one event.

    Attributes:
        notes: the messages, so that a command does not print them again at its end.
    """

    def __init__(self, show: Callable[[Event], None]) -> None:
        self._show = show
        self.notes: set[str] = set()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        self._show(event)
        if event.kind == "note":
            self.notes.add(event.message)


@contextmanager
def watch(*, quiet: bool = False, silent: bool = False, stream: TextIO | None = None) -> Iterator[Watcher]:
    """Yield a function that shows events on the standard error; see :func:`shown`. With ``silent`` it shows nothing."""
    if silent:
        yield Watcher(lambda event: None)
        return
    with shown(_live, PlainLines, lambda event: event.kind == "note", quiet=quiet, stream=stream) as show:
        yield Watcher(show)


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

    It is a live display on a terminal and writes plain lines elsewhere. With ``quiet`` it hides progress: it writes only the
    notes, which a person should read, each on a plain line.
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


class PlainLines:
    """Writes a line for each phase outside the blocks, each finished block and each note, and sometimes for progress."""

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
            what += [_memory(event), *([f"{clock(left)} left"] if left else [])]
            self._write(event, f"block {event.block + 1} of {event.blocks}, {', '.join(what)}")
        elif event.kind == "epoch":
            what = [] if event.loss is None else [f"loss {event.loss:.4g}"]
            what.append("held-out loss " + ("not a number" if event.held_out is None else f"{event.held_out:.4g}"))
            left = self._position.remaining(event.seconds)
            what += [_memory(event), *([f"{clock(left)} left"] if left else [])]
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
        self._stream.write(f"[{clock(event.seconds)}] {text}\n")
        self._stream.flush()


def live_lines(position: Position, now: float, width: int = 120) -> tuple[str, str]:
    """Return the two lines of the live display: the position of the run, and its time and memory.

    ``now`` is in seconds since the run began; ``width`` is in characters: on a narrow terminal the bar is shortened first.
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
    times = f"{clock(now)} elapsed" + ("" if left is None else f", {clock(left)} left")
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


def clock(seconds: float) -> str:
    """Return seconds as ``M:SS``, or ``H:MM:SS`` from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
