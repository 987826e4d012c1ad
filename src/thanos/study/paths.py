"""Locations of a study's models, texts and tasks on this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from thanos.calibration.text import NAMED, check_text_source, text_sha256
from thanos.calibration.text_files import OTHER_NAMES, Part, exists, matching, parts_of, split_source
from thanos.errors import DataError, StudyError, UserError
from thanos.evaluation.windows import check_window
from thanos.model.bos import added_bos
from thanos.model.fingerprint import model_sha256, source_commit, task_files_sha256
from thanos.model.loading import adapter_notes, context_length, load_model
from thanos.model.source import ModelSource, resolve_model
from thanos.study.config import location_of
from thanos.study.events import StudyEvent, Watcher
from thanos.study.grid import Cell, Study
from thanos.system.suggestions import near
from thanos.system.user_paths import without_folders


@dataclass(frozen=True, kw_only=True, slots=True)
class Locations:
    """Locations on this machine. The store gets only the hashes and the commit.

    Attributes:
        out: the study's folder.
        models: name in the study → model argument for ``prune``.
        texts: name in the study → source or path.
        task_folder: folder of local tasks; None without one.
        tasks_hash: sha256 of the files in ``task_folder`` and of the files that they name; None without a folder.
        hashes: name in the study → sha256 of the model or text; None if there is no file.
        searched: the folders that were searched, as the user named them, in words: ``not in X`` or ``in none of X, Y``.
        failures: name of a model that cannot be used → reason.
        with_bos: names of models whose tokenizers begin texts with a beginning-of-text token.
        commit: commit of the source tree; None if unknown.
    """

    out: Path
    models: dict[str, str]
    texts: dict[str, str]
    task_folder: str | None
    tasks_hash: str | None
    hashes: dict[str, str | None]
    failures: dict[str, str]
    searched: str
    commit: str | None
    with_bos: frozenset[str] = frozenset()

    @property
    def scratch(self) -> Path:
        """Folder of the pruned models until they are measured."""
        return self.out / "scratch"

    def asked(self, study: Study, cell: Cell) -> dict[str, Any]:
        """Return the settings outside the cell that affect its record: those of :meth:`Study.asked`, and ``bos``.

        ``bos`` exists only for models whose tokenizers add a beginning-of-text token, with which their calibration windows
        begin. So the keys of all other cells are the same as in versions without ``bos``.
        """
        asked = study.asked(cell)
        return asked | {"bos": study.evaluation.bos} if cell.model in self.with_bos else asked

    def sources(self, study: Study, cell: Cell) -> dict[str, str | None]:
        """Return the hashes of the files that a cell depends on."""
        return {
            "model": self.hashes.get(cell.model),
            "calibration": None if cell.calibration is None else self.hashes.get(cell.calibration),
            "text": None if cell.model in study.cost_only else self.hashes.get(study.evaluation.text),
            "tasks": self.tasks_hash if cell in study.zero_shot_cells else None,
        }

    def without_paths(self, text: str) -> str:
        """Return a message as one line, without the paths of local folders."""
        texts = [part.path for text in self.texts.values() for part in split_source(text)]
        inside = [str(out / "store.jsonl") for out in (self.out, self.out.resolve())]
        paths = [*self.models.values(), *texts, *inside, *([self.task_folder] if self.task_folder else [])]
        return " ".join(without_folders(text, paths).split())


def _in_none(folders: Sequence[Path]) -> str:
    """Say that something is in none of these folders."""
    names = list(dict.fromkeys("the current folder" if str(folder) == "." else str(folder) for folder in folders))
    return f"not in {names[0]}" if len(names) == 1 else f"in none of {', '.join(names)}"


def _check_text(study: Study, texts: dict[str, str], searched: str) -> None:
    """Raise StudyError if the text for evaluation cannot be used."""
    text = study.evaluation.text
    location = location_of(study, "evaluation", "text")
    if is_absent(text, texts[text]):
        hint = near(text, [name for name in NAMED if name != "self"], OTHER_NAMES)
        raise StudyError(f"{location}: {text} is {searched}; give its folder with --data{hint}")
    try:
        check_text_source(texts[text], evaluation=True)
    except DataError as error:
        raise StudyError(f"{location}: {error}") from error


def _check_evaluation(study: Study, source: ModelSource, texts: dict[str, str]) -> None:
    """Raise DataError if the evaluation of a model would fail after pruning.

    This is the case if its windows are longer than its number of positions, or if its tokenizer cannot render the text's chats.
    """
    check_window(study.evaluation.sequence_length, source.config())
    check_text_source(texts[study.evaluation.text], evaluation=True, tokenizer=source.tokenizer)


def _check_calibration(study: Study, model: str, source: ModelSource) -> None:
    """Raise DataError if the calibration windows of a cell are longer than the model's number of positions."""
    lengths = [cell.sequence_length for cell in study.cells if cell.model == model and cell.sequence_length is not None]
    longest, positions = max(lengths, default=0), context_length(source.config())
    if positions is not None and longest > positions:
        raise DataError(
            f"calibration with sequence_length {longest} is beyond the {positions} positions of {model}; set it in "
            f"[[grid]] to {positions} or less"
        )


def is_absent(name: str, source: str) -> bool:
    """Whether a text names files that do not exist; ``source`` is its source after the search."""
    return name not in NAMED and any(not (exists(part.path) or matching(part.path)) for part in parts_of(source))


# --- finding models and texts -----------------------------------------------------------------------------------------


def find_locations(study: Study, out: Path, data: str | Path | None) -> Locations:
    """Find a study's models and texts in ``data`` (default ``THANOS_DATA``), else in the folder of ``study.toml``.

    A name that exists in neither folder is kept, as a hub name, a named text or a path. Raises StudyError if the text for
    evaluation, or the folder of tasks, does not exist.
    """
    folders = [Path(folder) for folder in (data or os.environ.get("THANOS_DATA"), study.path.parent) if folder]

    def find(name: str) -> str:
        return next((str((each / name).resolve()) for each in folders if (each / name).exists()), name)

    text = study.evaluation.text if study.evaluates else None
    sources = {name for name in (text, *(cell.calibration for cell in study.cells)) if name}
    texts = {name: name if name in NAMED else _find_text(name, folders) for name in sorted(sources)}
    searched = _in_none(folders)
    task_folder = study.zero_shot and study.zero_shot.task_folder
    if text:
        _check_text(study, texts, searched)
    if task_folder and not Path(find(task_folder)).is_dir():
        location = location_of(study, "zero_shot", "task_folder")
        raise StudyError(f"{location}: {task_folder} is {searched}; give the folder that contains it with --data")
    task_folder = find(task_folder) if task_folder else None
    hashes: dict[str, str | None] = {
        name: None if name in NAMED else text_sha256(found) for name, found in texts.items()
    }
    models, failures, with_bos = {}, {}, set()
    for model in study.models:
        models[model] = find(model)
        hashes[model] = None
        try:
            source = resolve_model(models[model])
            hashes[model] = model_sha256(source)
            if (_converted(out, hashes[model]) / "config.json").exists():  # a GGUF file takes seconds to open
                source = resolve_model(_converted(out, hashes[model]))
            if added_bos(source.tokenizer()):
                with_bos.add(model)
            _check_calibration(study, model, source)
            if model not in study.cost_only:
                _check_evaluation(study, source, texts)
        except UserError as error:
            hint = "" if exists(models[model]) else f"; it is {searched}: give its folder with --data"
            failures[model] = f"{error}{hint}"
    return Locations(
        out=out.resolve(),
        models=models,
        texts=texts,
        task_folder=task_folder,
        tasks_hash=task_files_sha256(task_folder) if task_folder else None,
        hashes=hashes,
        failures=failures,
        searched=searched,
        commit=source_commit(),
        with_bos=frozenset(with_bos),
    )


def _find_text(name: str, folders: Sequence[Path]) -> str:
    """Return a text with the full paths of its files, folders and patterns, from the first folder that has them.

    A part that no folder has keeps its name.
    """

    def find(part: Part) -> Part:
        for folder in folders:
            path = str(folder / part.path)
            if exists(path) or matching(path):
                return replace(part, path=str(Path(path).resolve()))
        return part

    whole = find(Part(name))
    return whole.path if whole != Part(name) else ",".join(str(find(part)) for part in split_source(name))


def convert(locations: Locations, wanted: set[str], emit: Watcher) -> Locations:
    """Convert the GGUF models among ``wanted`` into safetensors folders in the cache, so that opening them is fast."""
    models = dict(locations.models)
    for name in sorted(wanted):
        source = resolve_model(models[name])
        if source.gguf is None:
            continue
        folder = _converted(locations.out, locations.hashes[name])
        if not (folder / "config.json").exists():
            emit(StudyEvent(message=f"converting {source.gguf.name} to safetensors, once"))
            for line in adapter_notes(source):
                emit(StudyEvent(message=line))
            _save(source, folder)
        models[name] = str(folder)
    return replace(locations, models=models)


def _converted(out: Path, model_hash: str | None) -> Path:
    """Return the folder of a converted model; it exists if the model was converted."""
    return out / "cache" / "models" / str(model_hash)[:24]


def _save(source: ModelSource, folder: Path) -> None:
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    load_model(source).save_pretrained(partial)
    source.tokenizer().save_pretrained(partial)
    partial.rename(folder)
