"""Names of models and folders as users give them: text or a path object. A leading ``~`` is expanded."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from thanos.errors import ModelError, UserError

_ALLOWED = "a hub name, a local folder or a .gguf file"


def model_name(model: Any, what: str = "MODEL") -> str:
    """Return the name of a model as text.

    Args:
        model: a hub name, or a path as text or as an object.
        what: name of the argument in the error message.

    Raises:
        ModelError: the name is empty, or ``model`` is neither text nor a path.
    """
    if isinstance(model, str | os.PathLike):
        text = os.fsdecode(model)
        if not text.strip():
            raise ModelError(f"{what} is empty; give {_ALLOWED}")
        return str(expanded(text)) if text.startswith("~") else text
    kind = type(model).__name__
    if hasattr(model, "save_pretrained") or hasattr(model, "state_dict"):
        raise ModelError(
            f"{what} is an object in memory ({kind}), but it is read from the disk; save the model and its "
            f"tokenizer with save_pretrained(FOLDER), and give FOLDER; thanos.prune_model prunes a model in memory"
        )
    raise ModelError(f"{what} must be {_ALLOWED}; got {kind} {str(model)[:60]!r}")


def output_path(out: Any, name: str = "OUT") -> Path:
    """Return the path of the output folder ``name``. Raises UserError if ``out`` is empty or is not a path."""
    if not isinstance(out, str | os.PathLike) or not os.fsdecode(out).strip():
        raise UserError(f"{name} must be the path of a folder; got {str(out)[:60]!r}")
    return expanded(os.fsdecode(out))


def without_folders(text: str, paths: Iterable[str]) -> str:
    """Return a message with the parent folders removed from the paths in it.

    ``paths`` are the paths that the message may contain.
    """
    folders = {str(Path(path).parent) for path in paths if os.sep in path} - {"/", "."}
    for folder in sorted(folders, key=len, reverse=True):
        text = text.replace(f"{folder}{os.sep}", "")
    return text


def expanded(path: str | Path) -> Path:
    """Return a path with the home folder for a leading ``~``, unless a file of the literal name exists."""
    path = Path(path)
    try:
        return path if path.exists() else path.expanduser()
    except (RuntimeError, OSError):  # no such user, or the name is too long: opening the path raises the error
        return path
