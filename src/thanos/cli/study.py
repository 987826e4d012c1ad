"""``thanos study``: run a grid of cells, and show the progress of each worker."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from thanos.cli import interrupts
from thanos.cli import progress as display
from thanos.cli.options import Quiet, Threads, check_threads, examples, option
from thanos.errors import resource_errors
from thanos.settings import Heading

if TYPE_CHECKING:
    from thanos.events import Event
    from thanos.study.events import StudyEvent
    from thanos.study.run import StudyResult

EXAMPLES = examples(
    ("Run a study, or continue it", "thanos study study.toml results"),
    ("Show its cells and their state", "thanos study study.toml results --list"),
    (
        "Run it on two GPUs, with two workers on each",
        "thanos study study.toml results --devices cuda:0,cuda:1 --workers 2",
    ),
)

_PROGRESS_SECONDS = 30.0
"""Least seconds between two plain lines about a running cell, and before the first one."""


def study(
    file: Annotated[Path, typer.Argument(metavar="STUDY.toml", help="The study.", show_default=False)],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="The study's folder; an earlier run in it is continued.", show_default=False
        ),
    ],
    data: Annotated[
        Path | None,
        option(
            "Folder that is searched first for the study's models and texts",
            Heading.RUN,
            "DIR",
            default="$THANOS_DATA, then the folder of STUDY.toml",
        ),
    ] = None,
    devices: Annotated[
        str,
        option(
            "Devices separated by commas, one worker on each; a device may be repeated",
            Heading.RUN,
            "NAMES",
            default="auto: every CUDA device, else cpu",
        ),
    ] = "auto",
    workers: Annotated[int, option("Workers on each of these devices", Heading.RUN, "N")] = 1,
    threads: Threads = None,
    list_only: Annotated[
        bool, option("Show the cells and their state, and run nothing", Heading.RUN, None, "--list", default="run")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Run the cells of a study that have no result yet, and add their results to OUT/store.jsonl.

    Exits with 1 if cells failed; their reasons are kept.
    """
    check_threads(threads)
    from thanos.cli import tables

    display.hush()
    from thanos.study.run import list_cells, run_study

    if list_only:
        found = list_cells(file, out, data=data)
        rows = [
            (cell.title(), state, "yes" if cell in found.with_tasks else "") for cell, state in found.states.items()
        ]
        tables.print_table(("cell", "state", "tasks"), rows)
        return
    with watch(quiet=quiet) as watcher, _continuable(watcher) as counted:
        found = run_study(
            file,
            out,
            data=data,
            devices=[name.strip() for name in devices.split(",") if name.strip()],
            workers=workers,
            threads=threads,
            on_event=counted,
            initialise=display.hush,
        )
    _show(found, out)
    if without := found.count("failed") + found.count("impossible"):
        typer.echo(f"error: {_failures(found, without, out)}", err=True)
        raise typer.Exit(1)


@contextmanager
def _continuable(watcher: Callable[[StudyEvent], None]) -> Iterator[Callable[[StudyEvent], None]]:
    """Yield ``watcher``, and count its events. Raise EndedEarly, with the number of finished cells, if the study ends early."""
    done = total = 0

    def counted(event: StudyEvent) -> None:
        nonlocal done, total
        if event.total:  # notes about the study as a whole have none
            done, total = event.done, event.total
        watcher(event)

    try:
        with resource_errors():
            yield counted
    except (KeyboardInterrupt, Exception) as error:
        if not total or interrupts.needs_another_request(error):
            raise
        raise interrupts.EndedEarly(error, done, total, "cells of this run", prepared=True, same=True) from error


def _failures(found: StudyResult, without: int, out: Path) -> str:
    """Return in one line the number of cells without a result, the file with the reasons, and the cells that run again."""
    from thanos.study.store import STORE_NAME

    parts = [f"{without} of {len(found.states)} cells failed"]
    if count := found.count("impossible"):
        parts.append(f"{count} of them because their recipes are impossible: change the study")
    parts.append(f'the reasons are in {out / STORE_NAME} under "reason", and in the report of: thanos report {out}')
    if found.count("failed"):
        parts.append(f"the same command runs {'the others' if found.count('impossible') else 'them'} again")
    return "; ".join(parts)


def _show(found: StudyResult, out: Path) -> None:
    from thanos.cli import tables

    rows = [(name, str(found.count(name))) for name in ("done", "failed", "impossible") if found.count(name)]
    tables.print_table(
        ("", ""), [("cells", str(len(found.states))), *rows, ("run now", str(found.ran)), ("written to", str(out))]
    )


@contextmanager
def watch(*, quiet: bool = False, stream: TextIO | None = None) -> Iterator[Callable[[StudyEvent], None]]:
    """Yield a function that shows a study's events on the standard error."""
    with display.shown(_live, PlainLines, lambda event: bool(event.message), quiet=quiet, stream=stream) as show:
        yield show


class PlainLines:
    """Writes a line for each cell that ended and each note, and sometimes for a running cell.

    Args:
        stream: stream for the lines.
        clock: monotone clock, in seconds.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._began = clock()
        self._begun = 0
        self._running: dict[int, _Running] = {}

    def __call__(self, event: StudyEvent) -> None:
        """Write a line for an event, unless it is progress too soon after the cell's last line."""
        now = self._clock()
        if event.message:
            self._write(f"note: {event.message}")
        elif event.record is not None:
            self._running.pop(event.worker, None)
            left = (now - self._began) / event.done * (event.total - event.done)
            rest = f", {display.clock(left)} left" if event.done < event.total else ""
            self._write(f"{event.done} of {event.total}: {outcome(event)}{rest}")
        elif event.event is None:
            self._begun += 1
            self._running[event.worker] = _Running(self._begun, began=now, reported=now)
        elif event.event.kind != "note" and event.worker in self._running:
            self._report_progress(event, event.event, self._running[event.worker], now)

    def _report_progress(self, event: StudyEvent, inside: Event, cell: _Running, now: float) -> None:
        if now - cell.reported < _PROGRESS_SECONDS:
            return
        cell.reported = now
        title = event.cell.title() if event.cell else ""
        where = f"cell {cell.number} of {event.total}, {title}: {_within(inside)}"
        self._write(f"{where}, {display.clock(now - cell.began)} in this cell")

    def _write(self, text: str) -> None:
        self._stream.write(f"[{display.clock(self._clock() - self._began)}] {text}\n")
        self._stream.flush()


@dataclass(slots=True)
class _Running:
    """A running cell: its number in this run, and the clock's seconds at its start and at the last line about it."""

    number: int
    began: float
    reported: float


def _within(event: Event) -> str:
    """Return the position of a worker within its cell: ``solve, block 4 of 30``."""
    if event.block is not None and event.blocks:
        return f"{event.phase}, block {event.block + 1} of {event.blocks}"
    return f"{event.phase} {event.done} of {event.total}" if event.total else event.phase


def outcome(event: StudyEvent) -> str:
    """Return the result of a cell in one line."""
    assert event.record is not None
    assert event.cell is not None
    record, parts = event.record, [event.cell.title()]
    if record.status == "failed":
        return f"{parts[0]} failed: {record.reason}"
    if record.evaluation is not None:
        perplexity = record.evaluation["perplexity"]
        parts.append("perplexity infinite" if perplexity is None else f"perplexity {perplexity:.4g}")
    if record.seconds is not None:
        parts.append(f"pruned in {record.seconds:.1f} s")
    return ", ".join(parts)


@contextmanager
def _live(stream: TextIO) -> Iterator[Callable[[StudyEvent], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[details]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(file=stream), transient=True) as progress:
        yield _LiveLines(progress)


class _LiveLines:
    """One bar for the study, and one for the cell of each worker."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._study = progress.add_task("study", total=None, details="")
        self._tasks: dict[int, Any] = {}

    def __call__(self, event: StudyEvent) -> None:
        if event.message:
            self._progress.console.print(f"note: {event.message}", markup=False, highlight=False)
            return
        counted = {"completed": event.done, "total": event.total, "details": f"{event.done} of {event.total} cells"}
        self._progress.update(self._study, **counted)
        if event.record is not None:
            self._progress.console.print(outcome(event), markup=False, highlight=False)
            self._progress.remove_task(self._tasks.pop(event.worker))
        elif event.event is None:
            title = event.cell.title() if event.cell else ""
            self._tasks[event.worker] = self._progress.add_task(f"{event.device} {title}", total=None, details="")
        elif event.worker in self._tasks:
            self._show(event)

    def _show(self, event: StudyEvent) -> None:
        inside = event.event
        assert inside is not None
        if inside.block is not None and inside.blocks:
            completed, total = inside.block + (inside.kind == "block"), inside.blocks
            details = f"{inside.phase} block {inside.block + 1} of {inside.blocks}"
        else:
            completed, total, details = inside.done or None, inside.total or None, inside.phase
        self._progress.update(self._tasks[event.worker], completed=completed, total=total, details=details)
