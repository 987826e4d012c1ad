"""The events that a study reports while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from thanos.events import Event
from thanos.study.grid import Cell
from thanos.study.store import CellRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyEvent:
    """One step of a study, for displays.

    Attributes:
        worker: number of the worker, from 0.
        device: device of the worker.
        cell: the worker's cell; None for a note about the study as a whole.
        event: event of the cell's pruning or evaluation; None if a cell begins or ends.
        record: result of a cell that ended, else None.
        message: text of a note.
        done: number of cells that have ended in this run.
        total: number of cells in this run.
    """

    worker: int = 0
    device: str = ""
    cell: Cell | None = None
    event: Event | None = None
    record: CellRecord | None = None
    message: str = ""
    done: int = 0
    total: int = 0


Watcher = Callable[[StudyEvent], None]
