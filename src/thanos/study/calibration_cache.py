"""Calibration windows on the disk, which the workers of a study share."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from thanos.calibration.windows import Calibration
from thanos.system.files import write_atomically


def read_windows(path: Path, source: str) -> Calibration | None:
    """Return the windows of a file, with ``source`` as where they came from; None if there is no such file.

    A file of a version that did not say whether windows begin with BOS counts as none.
    """
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        made = file.metadata()
        if "bos" not in made:
            return None
        bos = int(made["bos"]) if made["bos"] else None
        return Calibration(file.get_tensor("ids"), source, made["rule"], int(made["seed"]), int(made["documents"]), bos)


def write_windows(path: Path, made: Calibration) -> None:
    """Put windows into the cache; another worker may do the same at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    described = {"rule": made.rule, "seed": str(made.seed), "documents": str(made.documents)}
    described["bos"] = "" if made.bos is None else str(made.bos)
    write_atomically(path, lambda part: save_file({"ids": made.ids.contiguous()}, part, metadata=described))
