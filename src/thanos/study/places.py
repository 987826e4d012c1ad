"""Where a study's models, texts and tasks are on this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

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
