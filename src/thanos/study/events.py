"""What a study reports while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from thanos.events import Event
from thanos.study.grid import Cell
from thanos.study.store import CellRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyEvent:
    """One step of a study, from which a display is drawn.

    Attributes:
        worker: its number, from 0.
        device: on which it runs.
        cell: the cell it runs; None for a note about the study as a whole.
        event: what the cell's pruning or evaluation tells; None where a cell begins or ends.
        record: the result, where a cell ended.
        message: for a note.
        done: cells that have ended in this run.
        total: cells of this run.
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
