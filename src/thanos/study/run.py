"""Running a study: select the cells without a result, find their models and texts, run the cells, and write the store."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from thanos.calibration.text import check_text_source, fetch_text
from thanos.errors import DataError, RecipeError, ResourceError, StudyError, UserError
from thanos.run.lock import locked
from thanos.run.work_folder import refuse_inside_model
from thanos.study.config import location_of, location_of_calibration, read_study
from thanos.study.events import StudyEvent, Watcher
from thanos.study.grid import DENSE, Cell, Study, public_cell
from thanos.study.paths import Locations, convert, find_locations, is_absent
from thanos.study.store import CellRecord, StoreWriter, cell_key, read_store, store_path
from thanos.study.workers import Pool
from thanos.system.device import choose_device

STUDY_NAME = "study.toml"


State = Literal["done", "failed", "impossible", "new"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyResult:
    """Result of a run.

    Attributes:
        states: state of every cell.
        with_tasks: cells on which the tasks are run.
        ran: number of cells that this run ran.
    """

    states: dict[Cell, State]
    with_tasks: frozenset[Cell]
    ran: int

    def count(self, state: State) -> int:
        """Return the number of cells in a state."""
        return sum(each == state for each in self.states.values())


def run_study(
    path: str | Path,
    out: str | Path,
    *,
    data: str | Path | None = None,
    devices: Sequence[str] = ("auto",),
    workers: int = 1,
    threads: int | None = None,
    on_event: Watcher | None = None,
    initialise: Callable[[], None] | None = None,
) -> StudyResult:
    """Run the cells of a study that have no result yet.

    Args:
        path: the ``study.toml``.
        out: the study's folder. It is created if it does not exist; otherwise its study is continued.
        data: folder that is searched for models and texts before the folder of ``study.toml``; default ``THANOS_DATA``.
        devices: names of devices, with repetitions for several workers on one device.
        workers: number of workers for each name in ``devices``.
        threads: number of torch's threads in each worker; None divides torch's default among the workers.
        on_event: called with each :class:`StudyEvent`.
        initialise: called first in each worker process; must be importable.

    Raises:
        UserError: the study is malformed, another process runs it, or the store cannot be read (damaged, or newer).
    """
    study, out, emit = read_study(path), Path(out), on_event or (lambda event: None)
    devices = _spread(devices, workers)
    if threads is not None and threads < 1:
        raise ResourceError(f"threads must be at least 1, or None for torch's own choice; got {threads}")
    with locked(out):
        _check_folder(out)
        locations = find_locations(study, out, data)
        _check_tasks(study, locations)
        states = _states(study, locations, emit)  # may raise an error, so nothing is written before it
        todo = [cell for cell, state in states.items() if state in ("new", "failed")]
        _check_inputs(study, locations, todo)
        (out / "cache").mkdir(parents=True, exist_ok=True)
        (out / STUDY_NAME).write_text(study.text, encoding="utf-8")
        shutil.rmtree(locations.scratch, ignore_errors=True)
        writer = StoreWriter(out)
        if todo:
            locations = convert(locations, {cell.model for cell in todo}, emit)
            pool = Pool(study, locations, devices[: len(todo)], initialise, threads)
            for done, event in pool.run(todo):
                if event.record is not None and event.cell is not None:
                    writer.append(event.record)
                    states[event.cell] = _state(event.cell, event.record)
                emit(replace(event, done=done, total=len(todo)))
        shutil.rmtree(locations.scratch, ignore_errors=True)
        return StudyResult(states=states, with_tasks=study.zero_shot_cells, ran=len(todo))


def list_cells(path: str | Path, out: str | Path, *, data: str | Path | None = None) -> StudyResult:
    """Return the state of every cell of a study; runs nothing and writes nothing. Arguments as for :func:`run_study`.

    Raises:
        UserError: the study is malformed, or the store cannot be read. Tasks are checked only if lm_eval is installed.
    """
    study, out = read_study(path), Path(out)
    locations = find_locations(study, out, data)
    if find_spec("lm_eval") is not None:  # the list needs no lm_eval
        _check_tasks(study, locations)
    states = _states(study, locations, lambda event: None)
    return StudyResult(states=states, with_tasks=study.zero_shot_cells, ran=0)


# --- the cells to run -------------------------------------------------------------------------------------------------


def _states(study: Study, locations: Locations, emit: Watcher) -> dict[Cell, State]:
    """Return the state of each cell in the store. A result is ignored if its model, text or tasks have changed."""
    contents = read_store(locations.out) if store_path(locations.out).exists() else None
    for warning in contents.warnings if contents else ():
        emit(StudyEvent(message=warning))
    known = {record.key: record for record in (contents.records if contents else ())}
    states: dict[Cell, State] = {}
    for cell in study.cells:
        record = known.get(cell_key(public_cell(cell), locations.asked(study, cell)))
        if record is None or _changed(record.sources, locations.sources(study, cell)):
            states[cell] = "new"
        else:
            states[cell] = _state(cell, record)
    return states


def _state(cell: Cell, record: CellRecord) -> State:
    """Return the state of a cell from its record. ``impossible``: no recipe allows it, so it does not run again."""
    impossible = record.status == "failed" and record.reason == _impossible(cell)
    return "impossible" if impossible else record.status


def _changed(recorded: dict[str, str | None], now: dict[str, str | None]) -> bool:
    """Whether a source has changed. Sources that the record lacks, such as tasks in older versions, are not compared."""
    return any(recorded[name] != now[name] for name in recorded.keys() & now.keys())


def _impossible(cell: Cell) -> str | None:
    if cell.method == DENSE:
        return None
    try:
        cell.recipe()
    except RecipeError as error:
        return str(error)
    return None


def _spread(devices: Sequence[str], workers: int) -> list[str]:
    """Return the device of each worker; ``auto`` is every CUDA device, or the CPU without any."""
    count = torch.cuda.device_count()
    all_of_them = [f"cuda:{index}" for index in range(count)] if torch.cuda.is_available() else ["cpu"]
    chosen = [each for device in devices for each in (all_of_them if device == "auto" else [device])]
    if workers < 1:
        raise ResourceError(f"--workers must be at least 1; got {workers}")
    if not chosen:
        raise ResourceError("--devices names no device; choose auto, cpu, cuda:0 or several, separated by commas")
    for device in chosen:
        choose_device(device)
    return [device for device in chosen for _ in range(workers)]


def _check_folder(out: Path) -> None:
    if out.is_file():
        raise UserError(f"OUT {out} is a file; give the name of a folder")
    if out.is_dir() and any(out.iterdir()) and not ((out / STUDY_NAME).exists() or store_path(out).exists()):
        raise UserError(f"OUT {out} is not empty and is not the folder of a study; choose another one")
    if not store_path(out).exists():
        refuse_inside_model(out)


def _check_tasks(study: Study, locations: Locations) -> None:
    if study.zero_shot is not None and study.zero_shot_cells:
        from thanos.evaluation.tasks import check_tasks

        try:
            check_tasks(study.zero_shot.tasks, locations.task_folder)
        except DataError as error:
            raise StudyError(f"{location_of(study, 'zero_shot', 'tasks')}: {error}") from error


def _check_inputs(study: Study, locations: Locations, todo: Sequence[Cell]) -> None:
    """Raise StudyError if models or texts of the cells ``todo`` cannot be used, before any cell runs.

    The error lists all such models and calibration texts, with the line of the study that names each. The text for evaluation
    is downloaded if it has to be.
    """
    refused = []
    for name in dict.fromkeys(cell.model for cell in todo):
        if name in locations.failures:
            refused.append(f"{location_of(study, '', 'models')}: {locations.failures[name]}")
    for name in dict.fromkeys(cell.calibration for cell in todo if cell.calibration):
        try:
            check_text_source(locations.texts[name])
        except DataError as error:
            absent = is_absent(name, locations.texts[name])
            said = f"{name} is {locations.searched}; give its folder with --data" if absent else str(error)
            refused.append(f"{location_of_calibration(study, name)}: {said}")
    if refused:
        raise StudyError("; ".join(refused))
    if study.evaluates and any(cell.model not in study.cost_only for cell in todo):
        try:
            fetch_text(locations.texts[study.evaluation.text], evaluation=True)
        except DataError as error:
            raise StudyError(f"{location_of(study, 'evaluation', 'text')}: {error}") from error
