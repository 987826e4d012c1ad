"""Download a model from the hub: the files that a run reads, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from thanos.checkpoint.weight_files import INDEX_NAME, SINGLE_NAME, parse_index
from thanos.errors import ModelError
from thanos.model.transformers_errors import first_line

_AUXILIARY = ["*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "README.md"]
_TEMPLATES = "additional_chat_templates/*"


def download(name: str, *, code: bool) -> Path:
    """Return the local folder of a hub model; download files that are not in the cache, Python code only with ``code``.

    The first download holds the index, config, tokenizer and licence. The index names the weights, which come second. Other
    files of the repository, such as the same weights in other formats, are not downloaded. Raises ModelError if the name is
    not valid, or the files cannot be downloaded.
    """
    from huggingface_hub.errors import HFValidationError

    try:
        folder = Path(_snapshot(name, allow_patterns=_AUXILIARY, ignore_patterns=["*/*"]))
        index = folder / INDEX_NAME
        weights = dict.fromkeys(parse_index(index, index.read_bytes()).values()) if index.is_file() else [SINGLE_NAME]
        # Both downloads must be of one commit, even if another is pushed in between. The folder's name is its hash.
        commit = folder.name if re.fullmatch("[0-9a-f]{40}", folder.name) else None
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
