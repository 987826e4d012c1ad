"""Hashes of the inputs of a result: files, a model's weights, config and tokenizer, task files, and the source tree."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from contextlib import suppress
from pathlib import Path

from thanos.checkpoint.weight_files import find_weights
from thanos.model.source import ModelSource

_SHAPING = ("config.json", "tokenizer*", "vocab*", "merges.txt", "*.model", "*.py")
"""Files that determine a model's logits for a text, besides its weights. Reports and generation settings are not among them."""


def file_sha256(path: str | Path) -> str:
    """Return the sha256 of a file's content."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_sha256(source: ModelSource) -> str:
    """Return a hash of a model's weights, config and tokenizer. It does not depend on the folder's name.

    Raises ModelError if there are no weights, or two sets of them.
    """
    if source.gguf is not None and source.gguf_parts == (source.gguf,):
        return file_sha256(source.gguf)
    digest = hashlib.sha256()
    for part in source.gguf_parts:
        digest.update(f"{file_sha256(part)}\n".encode())
    if source.gguf is not None:
        return digest.hexdigest()
    weights = {source.folder / name for name in find_weights(source.folder, source.name).names}
    for path in sorted(weights | {path for glob in _SHAPING for path in source.folder.glob(glob)}):
        digest.update(f"{path.name} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def task_files_sha256(folder: str | Path) -> str:
    """Return a hash of a folder of lm_eval's task files (YAML), and of the data files that these name.

    Hidden files and compiled Python are ignored. A word in a YAML file names a data file if it is the path of a file, relative
    to the folder.
    """
    folder = Path(folder)
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    found = {name for name in found if not any(part.startswith((".", "__pycache__")) for part in Path(name).parts)}
    for name in [name for name in found if name.endswith((".yaml", ".yml"))]:
        words = re.findall(r"[^\s\"'\[\]{},]+", (folder / name).read_text(encoding="utf-8", errors="replace"))
        found.update(word for word in words if _is_file(folder / word))
    digest = hashlib.sha256()
    for name in sorted(found):
        digest.update(f"{name} {file_sha256(folder / name)}\n".encode())
    return digest.hexdigest()


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a word too long to be a name
        return False


def source_commit() -> str | None:
    """Return the commit of this package's source tree, with ``+changes`` if a file was edited; None if unknown.

    ``THANOS_COMMIT`` overrides it, because a copy of the tree may lie in a repository of another history.
    """
    if stated := os.environ.get("THANOS_COMMIT"):
        return stated
    here = ["git", "-C", str(Path(__file__).parent)]
    with suppress(OSError, subprocess.SubprocessError):
        head = subprocess.run([*here, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = [*here, "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout.strip()
        return f"{head}+changes" if changed else head
    return None
