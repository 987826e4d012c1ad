"""Running a study: which cells are still to be run, where their models and texts are, and the one writer of the store."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from thanos.beginnings import added_bos
from thanos.errors import DataError, RecipeError, ResourceError, StudyError, UserError
from thanos.fingerprint import model_sha256, source_commit, task_files_sha256, text_sha256
from thanos.lock import locked
from thanos.pretrained import ModelSource, choose_device, load_model, resolve_model
from thanos.study.grid import DENSE, FORMULA, Cell, Study, public_cell
from thanos.study.places import Places
from thanos.study.pool import Pool, StudyEvent
from thanos.study.reading import place_of, place_of_calibration, read_study
from thanos.study.store import CellRecord, StoreWriter, cell_key, read_store, store_path
from thanos.text import NAMED, check_text_source
from thanos.textfiles import Part, exists, matching, split_source

STUDY_NAME = "study.toml"

State = Literal["done", "failed", "impossible", "new"]


Watcher = Callable[[StudyEvent], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyResult:
    """What a run of a study came to: every cell with its state, those with tasks, and how many cells this run ran."""

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
        out: the study's folder; made if it does not exist, gone on with if it does.
        data: folder in which the study's models and texts are looked for before the study's own; default ``THANOS_DATA``.
        devices: one worker runs on each; a device may be named several times.
        workers: workers on each of the devices.
        threads: of torch in each worker; None shares torch's own choice among the workers.
        on_event: called with each :class:`StudyEvent`.
        initialise: called first in each worker process; must be importable.

    Raises:
        UserError: the study is malformed, another process runs it, or the store is not this version's.
    """
    study, out, tell = read_study(path), Path(out), on_event or (lambda event: None)
    devices = _spread(devices, workers)
    if threads is not None and threads < 1:
        raise ResourceError(f"threads must be at least 1, or None for torch's own choice; got {threads}")
    with locked(out):
        _check_folder(out)
        places = find_places(study, out, data)
        _check_tasks(study, places)
        states = _states(study, places, tell)  # which may refuse: nothing is written before
        (out / "cache").mkdir(parents=True, exist_ok=True)
        (out / STUDY_NAME).write_text(study.text, encoding="utf-8")
        shutil.rmtree(places.scratch, ignore_errors=True)
        writer = StoreWriter(out)
        todo = [cell for cell, state in states.items() if state in ("new", "failed")]
        if todo:
            _warn_of_calibration(study, places, todo, tell)
            places = convert(places, {cell.model for cell in todo}, tell)
            pool = Pool(study, places, devices[: len(todo)], initialise, threads)
            for done, event in pool.run(todo):
                if event.record is not None and event.cell is not None:
                    writer.append(event.record)
                    states[event.cell] = _state(event.cell, event.record)
                tell(replace(event, done=done, total=len(todo)))
        shutil.rmtree(places.scratch, ignore_errors=True)
        return StudyResult(states=states, with_tasks=study.zero_shot_cells, ran=len(todo))


def list_cells(path: str | Path, out: str | Path, *, data: str | Path | None = None) -> StudyResult:
    """Return the state of every cell of a study; runs nothing and writes nothing. Arguments as for :func:`run_study`.

    Raises:
        UserError: the study is malformed, or the store is not this version's. Tasks are checked where lm_eval is installed.
    """
    study, out = read_study(path), Path(out)
    places = find_places(study, out, data)
    if find_spec("lm_eval") is not None:  # without it a store can be looked at all the same
        _check_tasks(study, places)
    states = _states(study, places, lambda event: None)
    return StudyResult(states=states, with_tasks=study.zero_shot_cells, ran=0)


# --- what is to be run ------------------------------------------------------------------------------------------------


def _states(study: Study, places: Places, tell: Watcher) -> dict[Cell, State]:
    """Return the state of each cell by the store; a result whose model, text or tasks have changed since does not count."""
    contents = read_store(places.out) if store_path(places.out).exists() else None
    for warning in contents.warnings if contents else ():
        tell(StudyEvent(message=warning))
    known = {record.key: record for record in (contents.records if contents else ())}
    states: dict[Cell, State] = {}
    for cell in study.cells:
        record = known.get(cell_key(public_cell(cell), places.asked(study, cell)))
        if record is None or _changed(record.sources, places.sources(study, cell)):
            states[cell] = "new"
        else:
            states[cell] = _state(cell, record)
    return states


def _state(cell: Cell, record: CellRecord) -> State:
    """Return what a cell's record says of it; one that is recorded as impossible is not tried again."""
    impossible = record.status == "failed" and record.reason == _impossible(cell)
    return "impossible" if impossible else record.status


def _changed(recorded: dict[str, str | None], now: dict[str, str | None]) -> bool:
    """Whether a source is another one; of one that an older version did not record, such as tasks, nothing is known."""
    return any(recorded[name] != now[name] for name in recorded.keys() & now.keys())


def _impossible(cell: Cell) -> str | None:
    if cell.method in (DENSE, FORMULA):
        return None
    try:
        cell.recipe()
    except RecipeError as error:
        return str(error)
    return None


def _spread(devices: Sequence[str], workers: int) -> list[str]:
    """Return the device of each worker: ``auto`` is every CUDA device, or the CPU."""
    count = torch.cuda.device_count()
    all_of_them = [f"cuda:{index}" for index in range(count)] if torch.cuda.is_available() else ["cpu"]
    found = [each for device in devices for each in (all_of_them if device == "auto" else [device])]
    if not found or workers < 1:
        raise ResourceError(
            f"nothing to run on: {len(found)} devices with {workers} workers each; give at least one of both"
        )
    for device in found:
        choose_device(device)
    return [device for device in found for _ in range(workers)]


def _check_folder(out: Path) -> None:
    if out.is_file():
        raise UserError(f"OUT {out} is a file; give the name of a folder")
    if out.is_dir() and any(out.iterdir()) and not ((out / STUDY_NAME).exists() or store_path(out).exists()):
        raise UserError(f"OUT {out} is not empty and no study's folder; choose another one")


def _check_text(study: Study, texts: dict[str, str], searched: str) -> None:
    """Refuse a text for evaluation that cannot be used."""
    text = study.evaluation.text
    place = place_of(study, "evaluation", "text")
    if _is_absent(text, texts[text]):
        raise StudyError(f"{place}: {text} is in none of {searched}; give its folder with --data")
    try:
        check_text_source(texts[text], evaluation=True)
    except DataError as error:
        raise StudyError(f"{place}: {error}") from error


def _is_absent(name: str, found: str) -> bool:
    """Whether a text is that of files which are not there."""
    return name not in NAMED and any(not (exists(part.path) or matching(part.path)) for part in _parts(found))


def _parts(source: str) -> list[Part]:
    return [Part(source)] if exists(source) else split_source(source)


def _check_tasks(study: Study, places: Places) -> None:
    if study.zero_shot is not None and study.zero_shot_cells:
        from thanos.harness import check_tasks

        try:
            check_tasks(study.zero_shot.tasks, places.task_folder)
        except DataError as error:
            raise StudyError(f"{place_of(study, 'zero_shot', 'tasks')}: {error}") from error


def _warn_of_calibration(study: Study, places: Places, todo: Sequence[Cell], tell: Watcher) -> None:
    """Tell of calibration files that are not there; it fails their cells alone, when they run."""
    for name in dict.fromkeys(cell.calibration for cell in todo if cell.calibration):
        try:
            check_text_source(places.texts[name])
        except DataError as error:
            absent = _is_absent(name, places.texts[name])
            said = f"{name} is not there" if absent else places.without_paths(str(error))
            what = "; give its folder with --data" if absent else ""
            tell(StudyEvent(message=f"{place_of_calibration(study, name)}: {said}, so its cells will fail{what}"))


# --- where things are -------------------------------------------------------------------------------------------------


def find_places(study: Study, out: Path, data: str | Path | None) -> Places:
    """Find a study's models and texts: in ``data`` (default ``THANOS_DATA``), else beside the study, else by their names.

    Raises:
        StudyError: the text for evaluation, or the folder of tasks, is not there.
    """
    folders = [Path(folder) for folder in (data or os.environ.get("THANOS_DATA"), study.path.parent) if folder]

    def find(name: str) -> str:
        return next((str((each / name).resolve()) for each in folders if (each / name).exists()), name)

    text = study.evaluation.text if study.evaluates else None
    sources = {name for name in (text, *(cell.calibration for cell in study.cells)) if name}
    texts = {name: name if name in NAMED else _find_text(name, folders) for name in sorted(sources)}
    searched = ", ".join(map(str, folders))
    task_folder = study.zero_shot and study.zero_shot.task_folder
    if text:
        _check_text(study, texts, searched)
    if task_folder and not Path(find(task_folder)).is_dir():
        place = place_of(study, "zero_shot", "task_folder")
        raise StudyError(f"{place}: {task_folder} is in none of {searched}; give the folder that holds it with --data")
    task_folder = find(task_folder) if task_folder else None
    hashes: dict[str, str | None] = {
        name: None if name in NAMED else text_sha256(found) for name, found in texts.items()
    }
    models, failures, begun = {}, {}, set()
    for model in study.models:
        models[model] = find(model)
        try:
            source = resolve_model(models[model])
            hashes[model] = model_sha256(source)
            if (_converted(out, hashes[model]) / "config.json").exists():  # a GGUF file takes seconds to open
                source = resolve_model(_converted(out, hashes[model]))
        except UserError as error:
            hashes[model], failures[model] = None, str(error)
            continue
        with suppress(UserError):  # its cells will tell
            if added_bos(source.tokenizer()) is not None:
                begun.add(model)
    return Places(
        out=out.resolve(),
        models=models,
        texts=texts,
        task_folder=task_folder,
        tasks_hash=task_files_sha256(task_folder) if task_folder else None,
        hashes=hashes,
        failures=failures,
        commit=source_commit(),
        begun=frozenset(begun),
    )


def _find_text(name: str, folders: Sequence[Path]) -> str:
    """Return a text with each of its files, folders and patterns where they are found first, else as they are named."""

    def find(part: Part) -> Part:
        for folder in folders:
            path = str(folder / part.path)
            if exists(path) or matching(path):
                return replace(part, path=str(Path(path).resolve()))
        return part

    whole = find(Part(name))
    return whole.path if whole != Part(name) else ",".join(str(find(part)) for part in split_source(name))


def convert(places: Places, wanted: set[str], tell: Watcher) -> Places:
    """Write GGUF models once as safetensors folders into the cache, since every opening would convert them again."""
    models = dict(places.models)
    for name in sorted(wanted - set(places.failures)):
        source = resolve_model(models[name])
        if source.gguf is None:
            continue
        folder = _converted(places.out, places.hashes[name])
        if not (folder / "config.json").exists():
            tell(StudyEvent(message=f"converting {source.gguf.name} to safetensors, once"))
            _save(source, folder)
        models[name] = str(folder)
    return replace(places, models=models)


def _converted(out: Path, model_hash: str | None) -> Path:
    """Return the folder in which a converted model lies, if it has been converted."""
    return out / "cache" / "models" / str(model_hash)[:24]


def _save(source: ModelSource, folder: Path) -> None:
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    load_model(source).save_pretrained(partial)
    source.tokenizer().save_pretrained(partial)
    partial.rename(folder)
