"""Files of calibration windows: the cache of a study, and the windows of a run that took long to generate."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from thanos.calibration.windows import Calibration
from thanos.system.files import write_atomically


def read_windows(path: Path, source: str) -> Calibration | None:
    """Return the windows of a file, with ``source`` as the name of their text; None if there is no such file, or it is damaged.

    Older versions did not record whether windows begin with BOS. Their files are ignored.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            made, ids = file.metadata() or {}, file.get_tensor("ids")
    except SafetensorError:  # such as a file that a full disk or a power failure has cut short
        return None
    if "bos" not in made:
        return None
    bos = tuple(map(int, made["bos"].split()))
    numbers = int(made["seed"]), int(made["documents"])
    generated = int(made.get("generated", 0)), made.get("prompts_sha256")
    return Calibration(ids, source, made["rule"], *numbers, bos, *generated)


def write_windows(path: Path, made: Calibration) -> None:
    """Write windows to a file. Another worker may write the same file at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    described = {"rule": made.rule, "seed": str(made.seed), "documents": str(made.documents)}
    described["generated"] = str(made.generated)
    if made.prompts_sha256 is not None:
        described["prompts_sha256"] = made.prompts_sha256
    described["bos"] = " ".join(map(str, made.bos_ids))
    write_atomically(path, lambda part: save_file({"ids": made.ids.contiguous()}, part, metadata=described))
