"""Where a study's models, texts and tasks are on this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thanos.study.grid import Cell, Study
from thanos.textfiles import split_source


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
        begun: models whose tokenizers begin texts with a beginning-of-text token.
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
    begun: frozenset[str] = frozenset()

    @property
    def scratch(self) -> Path:
        """Where pruned models lie until they are measured."""
        return self.out / "scratch"

    def asked(self, study: Study, cell: Cell) -> dict[str, Any]:
        """Return what, besides the cell, shapes its record: the study's wishes, and where a beginning-of-text token stands.

        ``bos`` is there for models whose tokenizers add that token, alone; their windows of calibration begin with it. So
        all other cells have the keys that they had in versions without it.
        """
        asked = study.asked(cell)
        return asked | {"bos": study.evaluation.bos} if cell.model in self.begun else asked

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
        texts = {part.path for text in self.texts.values() for part in split_source(text)}
        found = {path for path in [*self.models.values(), *texts, self.task_folder or ""] if os.sep in path}
        folders = {str(Path(path).parent) for path in found} | {str(self.out.resolve()), str(self.out)}
        for folder in sorted(folders - {"/", "."}, key=len, reverse=True):
            text = text.replace(f"{folder}{os.sep}", "")
        return " ".join(text.split())
