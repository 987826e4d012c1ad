"""Progress for people, drawn from events alone: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

from thanos.events import Event

_LABELS = {
    "load": "load model",
    "calibration": "calibrate",
    "statistics": "statistics",
    "solve": "solve",
    "write": "write",
    "propagate": "propagate",
    "evaluate": "evaluate",
    "finish": "finish",
    "draw": "draw figures",
}

_WITHIN_BLOCK = {"statistics": (0.0, 0.45), "solve": (0.45, 0.35), "propagate": (0.8, 0.2)}
"""Where a phase begins within a block, and the share of the block that it takes: only for a smooth bar."""

_PLAIN_SECONDS = 10.0
"""Least seconds between two plain lines that only tell of progress."""


def hush() -> None:
    """Keep transformers' and the hub's own progress bars and advice off the terminal; errors still come through."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # the GGUF reader asks nobody before it draws a bar
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


class Watcher(Protocol):
    """Takes events."""

    def __call__(self, event: Event) -> None:
        """Show one event."""
        ...


@contextmanager
def watch(*, quiet: bool = False, stream: TextIO | None = None) -> Iterator[Callable[[Event], None]]:
    """Give a function that shows events on the standard error, until the block ends."""
    target = stream or sys.stderr
    if quiet:
        yield lambda event: None
    elif target.isatty():
        with _live(target) as show:
            yield show
    else:
        yield PlainLines(target)


class PlainLines:
    """A line when a phase or block ends or a note comes, and now and then in between.

    Args:
        stream: where to.
        clock: seconds, monotone.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._began = self._last = clock()
        self._blocks_began: float | None = None
        self._phase = ""

    def __call__(self, event: Event) -> None:
        """Write a line, or not."""
        now = self._clock()
        if event.block is not None and self._blocks_began is None:
            self._blocks_began = now
        if event.kind == "note":
            self._write(f"note: {event.message}")
        elif event.kind == "block" and event.block is not None:
            error = "" if event.error is None else f", mean layer error {event.error:.4g}"
            self._write(f"block {event.block + 1} of {event.blocks}{error}, {_memory()}{self._remaining(event, now)}")
        elif event.kind == "phase" and event.block is None and event.phase != self._phase:
            self._phase = event.phase
            self._write(_LABELS[event.phase])
        elif event.kind == "progress" and now - self._last >= _PLAIN_SECONDS:
            where = "" if event.block is None else f"block {event.block + 1} of {event.blocks}, "
            self._write(f"{where}{_LABELS[event.phase]} {event.done} of {event.total}")

    def _remaining(self, event: Event, now: float) -> str:
        assert event.block is not None
        assert self._blocks_began is not None
        left = (now - self._blocks_began) / (event.block + 1) * (event.blocks - event.block - 1)
        return f", {_clock(left)} left" if left else ""

    def _write(self, text: str) -> None:
        self._last = self._clock()
        self._stream.write(f"[{_clock(self._last - self._began)}] {text}\n")
        self._stream.flush()


@contextmanager
def _live(stream: TextIO) -> Iterator[Callable[[Event], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[details]}"),
        TimeElapsedColumn(),
        TextColumn("<"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=stream), transient=True) as progress:
        yield _LiveLine(progress)


class _LiveLine:
    """One bar: the whole pruning run, or one phase outside of it."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._task = progress.add_task("starting", total=None, details="")
        self._stage = ""
        self._began = time.monotonic()
        self._error: float | None = None

    def __call__(self, event: Event) -> None:
        if event.kind == "note":
            self._progress.console.print(f"note: {event.message}", markup=False, highlight=False)
            return
        stage = "blocks" if event.block is not None else event.phase
        if stage != self._stage:
            self._enter(stage, event)
        if event.kind == "phase":
            self._began = time.monotonic()
        if event.error is not None:
            self._error = event.error
        description, completed, total = self._position(event)
        self._progress.update(
            self._task, description=description, completed=completed, total=total, details=self._details(event)
        )

    def _enter(self, stage: str, event: Event) -> None:
        self._progress.remove_task(self._task)
        self._task = self._progress.add_task(_LABELS.get(event.phase, ""), total=None, details="")
        self._stage, self._began = stage, time.monotonic()

    def _position(self, event: Event) -> tuple[str, float | None, float | None]:
        if event.block is None:
            return _LABELS[event.phase], event.done or None, event.total or None
        begin, share = _WITHIN_BLOCK.get(event.phase, (0.0, 0.0))
        inside = begin + share * (event.done / event.total if event.total else 0.0)
        if event.kind == "block":
            inside = 1.0
        layer = event.layer.rsplit(".", 1)[-1] if event.layer else ""
        name = f"block {event.block + 1}/{event.blocks} {_LABELS[event.phase]} {layer}"
        return f"{name:<32}", event.block + inside, event.blocks

    def _details(self, event: Event) -> str:
        parts = []
        spent = time.monotonic() - self._began
        if event.tokens and spent > 0.2:
            parts.append(f"{event.tokens / spent:,.0f} tokens/s")
        elif event.total:
            parts.append(f"{event.done} of {event.total}")
        if self._error is not None:
            parts.append(f"error {self._error:.4g}")
        return " · ".join([*parts, _memory()])


def _memory() -> str:
    from thanos.memory import host_bytes

    return f"{host_bytes() / 2**30:.1f} GiB"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
