"""Where a study's models, texts and tasks are on this machine."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from thanos.calibration.text import NAMED
from thanos.errors import StudyError, UserError
from thanos.model.fingerprint import file_sha256, model_sha256, source_commit, task_files_sha256
from thanos.model.loading import load_model
from thanos.model.source import ModelSource, resolve_model
from thanos.study.config import place_of
from thanos.study.events import StudyEvent, Watcher
from thanos.study.grid import Cell, Study


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Where things are on this machine; none of it enters the store but the hashes.

    Attributes:
        out: the study's folder.
        models: name in the study → what to give ``prune``.
        texts: name in the study → source or path.
        task_folder: of local tasks; None without one.
        tasks_hash: sha256 of the files in it and of those they name; None without one.
        hashes: name in the study → sha256 of the model or text; None where there is no file.
        failures: models that cannot be had, and why.
        commit: of the source tree; None where unknown.
    """

    out: Path
    models: dict[str, str]
    texts: dict[str, str]
    task_folder: str | None
    tasks_hash: str | None
    hashes: dict[str, str | None]
    failures: dict[str, str]
    commit: str | None

    @property
    def scratch(self) -> Path:
        """Where pruned models lie until they are measured."""
        return self.out / "scratch"

    def sources(self, study: Study, cell: Cell) -> dict[str, str | None]:
        """Return the hashes of the files that a cell depends on."""
        return {
            "model": self.hashes.get(cell.model),
            "calibration": None if cell.calibration is None else self.hashes.get(cell.calibration),
            "text": None if cell.model in study.cost_only else self.hashes.get(study.evaluation.text),
            "tasks": self.tasks_hash if cell in study.zero_shot_cells else None,
        }

    def without_paths(self, text: str) -> str:
        """Return a message in one line, without the folders of this machine."""
        found = {
            path for path in [*self.models.values(), *self.texts.values(), self.task_folder or ""] if os.sep in path
        }
        folders = {str(Path(path).parent) for path in found} | {str(self.out.resolve()), str(self.out)}
        for folder in sorted(folders - {"/", "."}, key=len, reverse=True):
            text = text.replace(f"{folder}{os.sep}", "")
        return " ".join(text.split())


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
    texts = {name: name if name in NAMED else find(name) for name in sorted(sources)}
    searched = ", ".join(map(str, folders))
    task_folder = study.zero_shot and study.zero_shot.task_folder
    if text and text not in NAMED and not Path(texts[text]).is_file():
        place = place_of(study, "evaluation", "text")
        raise StudyError(f"{place}: {text} is in none of {searched}; give its folder with --data")
    if task_folder and not Path(find(task_folder)).is_dir():
        place = place_of(study, "zero_shot", "task_folder")
        raise StudyError(f"{place}: {task_folder} is in none of {searched}; give the folder that holds it with --data")
    task_folder = find(task_folder) if task_folder else None
    hashes: dict[str, str | None] = {
        name: file_sha256(path) if Path(path).is_file() else None for name, path in texts.items()
    }
    models, failures = {}, {}
    for model in study.models:
        models[model] = find(model)
        try:
            hashes[model] = model_sha256(resolve_model(models[model]))
        except UserError as error:
            hashes[model], failures[model] = None, str(error)
    return Places(
        out=out.resolve(),
        models=models,
        texts=texts,
        task_folder=task_folder,
        tasks_hash=task_files_sha256(task_folder) if task_folder else None,
        hashes=hashes,
        failures=failures,
        commit=source_commit(),
    )


def convert(places: Places, wanted: set[str], tell: Watcher) -> Places:
    """Write GGUF models once as safetensors folders into the cache, since every opening would convert them again."""
    models = dict(places.models)
    for name in sorted(wanted - set(places.failures)):
        source = resolve_model(models[name])
        if source.gguf is None:
            continue
        folder = places.out / "cache" / "models" / str(places.hashes[name])[:24]
        if not (folder / "config.json").exists():
            tell(StudyEvent(message=f"converting {source.gguf.name} to safetensors, once"))
            _save(source, folder)
        models[name] = str(folder)
    return replace(places, models=models)


def _save(source: ModelSource, folder: Path) -> None:
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    load_model(source).save_pretrained(partial)
    source.tokenizer().save_pretrained(partial)
    partial.rename(folder)
