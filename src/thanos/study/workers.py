"""The worker processes of a study: one for each entry of ``devices``. They run the cells in order.

Each worker is a separate process. If the system kills it, the study loses only one cell.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

import torch

from thanos.events import Event
from thanos.study.events import StudyEvent
from thanos.study.grid import Cell, Study
from thanos.study.paths import Locations
from thanos.study.records import make_record
from thanos.study.session import Session, throttled
from thanos.study.store import CellRecord
from thanos.system.device import choose_device

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess


_END_SECONDS = 10.0
"""Seconds in which a worker can end by itself before it is killed."""


@dataclass(slots=True)
class _Worker:
    """One process and its current cell; None for an idle worker."""

    number: int
    device: str
    process: BaseProcess
    pipe: Connection
    cell: Cell | None = None


@dataclass(slots=True)
class Pool:
    """Worker processes.

    Args:
        study: the study.
        locations: locations of its models and texts.
        devices: names of devices, each for one worker.
        initialise: called first in each process.
        threads: number of torch's threads in each process; None divides torch's default among the processes.
    """

    study: Study
    locations: Locations
    devices: Sequence[str]
    initialise: Callable[[], None] | None
    threads: int | None = None
    _workers: list[_Worker] = field(default_factory=list)

    def run(self, cells: Sequence[Cell]) -> Iterator[tuple[int, StudyEvent]]:
        """Run cells; yield the number of cells that have ended, and each event."""
        waiting, done = list(cells), 0
        with self._started():
            for worker in self._workers:
                yield done, self._send_cell(worker, waiting)
            while any(worker.cell is not None for worker in self._workers):
                busy = {worker.pipe: worker for worker in self._workers if worker.cell is not None}
                for pipe in wait(list(busy)):
                    worker = busy[pipe]  # type: ignore[index]
                    event = self._receive(worker)
                    done += event.record is not None
                    yield done, event
                    if worker.cell is None and waiting:
                        yield done, self._send_cell(worker, waiting)

    def _send_cell(self, worker: _Worker, waiting: list[Cell]) -> StudyEvent:
        worker.cell = waiting.pop(0)
        with suppress(OSError):  # the worker has died: _receive detects it
            worker.pipe.send(worker.cell)
        return StudyEvent(worker=worker.number, device=worker.device, cell=worker.cell)

    def _receive(self, worker: _Worker) -> StudyEvent:
        """Return a worker's next event. If the worker has died, return a failed record and start a new worker."""
        event = StudyEvent(worker=worker.number, device=worker.device, cell=worker.cell)
        try:
            received = worker.pipe.recv()
        except (EOFError, OSError):
            received = self._replace_dead(worker)
        if isinstance(received, Event):
            return replace(event, event=received)
        worker.cell = None
        return replace(event, record=received)

    def _replace_dead(self, worker: _Worker) -> CellRecord:
        assert worker.cell is not None
        worker.process.join(timeout=10)
        _kill_group(worker.process)  # kill the worker's own child processes
        code = worker.process.exitcode
        how = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
        reason = (
            f"the worker process ended {how}; if no user ended it, memory was probably exhausted: use fewer workers"
        )
        results = {"status": "failed", "reason": reason}
        device, sharers = choose_device(worker.device), self._sharers(worker.device)
        record = make_record(self.study, self.locations, worker.cell, device, results, sharers=sharers)
        fresh = self._start(worker.number, worker.device)
        worker.process, worker.pipe = fresh.process, fresh.pipe
        return record

    @contextmanager
    def _started(self) -> Iterator[None]:
        try:
            for number, device in enumerate(self.devices):
                self._workers.append(self._start(number, device))  # one by one: if a start fails, _end ends the others
            yield
        finally:
            self._end()

    def _end(self) -> None:
        """End all workers and their child processes: send None to idle workers, and SIGTERM to busy ones."""
        try:
            for worker in self._workers:
                if worker.cell is None:
                    with suppress(OSError):
                        worker.pipe.send(None)
                else:
                    worker.process.terminate()
            deadline = time.monotonic() + _END_SECONDS
            for worker in self._workers:
                worker.process.join(max(0.0, deadline - time.monotonic()))
        finally:  # also if a second interruption arrives during the wait
            for worker in self._workers:
                _kill_group(worker.process)
                worker.process.join()
                worker.pipe.close()

    def _start(self, number: int, device: str) -> _Worker:
        # A forked process could not use CUDA, and would share the locks of torch's threads.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        sharers = self._sharers(device)
        arguments = (
            theirs,
            self.study,
            self.locations,
            device,
            sharers,
            len(self.devices),
            self.initialise,
            self.threads,
        )
        process = context.Process(target=_work, args=arguments, name=f"worker {number}", daemon=True)
        process.start()
        theirs.close()
        return _Worker(number, device, process, ours)

    def _sharers(self, device: str) -> int:
        return sum(other == device for other in self.devices)


def _work(
    pipe: Connection,
    study: Study,
    locations: Locations,
    device: str,
    sharers: int,
    workers: int,
    initialise: Callable[[], None] | None,
    threads: int | None,
) -> None:
    """The body of a worker process: it receives cells, and sends events and records."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the study's process handles an interrupt and ends its workers
    os.setpgid(0, 0)  # a signal to the group then reaches this process and its children, and no other
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if initialise is not None:
        initialise()
    torch.set_num_threads(threads or max(1, torch.get_num_threads() // workers))
    session = Session(study, locations, device, sharers=sharers)
    emit = throttled(pipe.send)
    while (cell := pipe.recv()) is not None:
        pipe.send(session.run(cell, emit))


def _end_with_parent() -> None:
    """Wait until the study's process ends, even by a kill; then kill this process and its children."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os.killpg(0, signal.SIGKILL)


def _kill_group(process: BaseProcess) -> None:
    """Kill a worker, if it still runs, and all its child processes."""
    process.kill()
    if process.pid is not None:
        with suppress(ProcessLookupError, PermissionError):  # the group is empty, or the worker died before it had one
            os.killpg(process.pid, signal.SIGKILL)
