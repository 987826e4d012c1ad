"""Names of models and texts for documents that may be published."""

from __future__ import annotations

from pathlib import PurePath

from thanos.calibration.text_files import SUFFIXES, Part, split_source

_FILES = (".gguf", ".safetensors", ".bin", ".json", *SUFFIXES)
"""Endings of local files that a user may give as model or calibration text."""


def public_name(name: str) -> str:
    """Return a name without local folders: a hub name unchanged, and only the last part of a local path.

    In a list of texts, each one is shortened in this way.
    """
    parts = split_source(name)
    if parts != [Part(name)]:
        return ",".join(str(Part(public_name(part.path), part.column)) for part in parts)
    path = PurePath(name)
    # Only known endings count, not any suffix: Qwen/Qwen2.5-0.5B is a hub name, not a file ".5B".
    is_path = path.is_absolute() or name.startswith((".", "~")) or name.lower().endswith(_FILES)
    if not is_path and len(path.parts) <= 2:
        return name
    return path.name if path.name not in ("", "..") else "a local model"
