"""Download a model from the hub: the files that a run reads, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from thanos.checkpoint.weight_files import INDEX_NAME, SINGLE_NAME, WeightFiles
from thanos.errors import ModelError
from thanos.model.transformers_errors import first_line

_AUXILIARY = ["*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "README.md"]
_TEMPLATES = "additional_chat_templates/*"


def download(name: str, *, code: bool, check: Callable[[Path, list[str]], WeightFiles]) -> Path:
    """Return the local folder of a hub model; download files that are not in the cache.

    The first download holds the index, config, tokenizer and licence; the weights come second. Other files, such as the same
    weights in other formats, are not downloaded.

    Args:
        name: name of the model.
        code: download its Python code too.
        check: function of the folder of the first download and of the paths of all files of the repository. It returns the
            model's weights, or raises ModelError to refuse the model.

    Raises:
        ModelError: the name is not valid, the files cannot be downloaded, or ``check`` refuses the model.
    """
    from huggingface_hub.errors import HFValidationError

    try:
        folder = Path(_snapshot(name, allow_patterns=_AUXILIARY, ignore_patterns=["*/*"]))
        # Both downloads must be of one commit, even if another is pushed in between. The folder's name is its hash.
        commit = folder.name if re.fullmatch("[0-9a-f]{40}", folder.name) else None
        weights = check(folder, _listed(name, commit, folder)).names
        wanted = [*map(_literally, weights), _TEMPLATES, *(["*.py"] if code else [])]
        return Path(_snapshot(name, revision=commit, allow_patterns=wanted))
    except HFValidationError as error:
        raise ModelError(f"{name!r} is not a hub name, and no such folder or .gguf file exists") from error
    except ModelError:
        raise
    except Exception as error:  # the hub client raises its own, requests' and httpx's errors
        raise ModelError(
            f"{name} is not a local folder or file, and cannot be downloaded from the hub ({first_line(error)}); check the "
            "name, or download it elsewhere and give the local folder or a .gguf file"
        ) from error


def _listed(name: str, commit: str | None, folder: Path) -> list[str]:
    """Return the paths of a repository's files.

    The list is empty if the hub cannot be reached but ``folder``, in the cache, has weights or an index. Without the hub,
    transformers reads only the cached files too.
    """
    from huggingface_hub import list_repo_files

    try:
        return list_repo_files(name, revision=commit)
    except Exception:  # as in download
        if (folder / INDEX_NAME).is_file() or (folder / SINGLE_NAME).is_file():
            return []
        raise


def _literally(name: str) -> str:
    """Return a pattern that matches this file name alone."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _snapshot(name: str, **arguments: Any) -> str:
    """Download files of one commit; offline, return the cached files."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        return snapshot_download(name, **arguments)
    except OfflineModeIsEnabled:  # older clients ask the hub for the list of a commit's files
        return snapshot_download(name, local_files_only=True, **arguments)
