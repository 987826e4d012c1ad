"""The cache of zero-shot scores: one file for each score, whose name is the score's key.

The key is a hash of everything that determines the score: the model's weights, config and tokenizer, the task's settings and
documents, the limit, the dtype, the type of device, the added BOS and what begins a text, and the versions of lm_eval,
transformers and torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from thanos.model.bos import added_bos, defined_bos
from thanos.model.fingerprint import model_sha256
from thanos.model.source import ModelSource
from thanos.system.files import write_atomically


def cache_folder() -> Path:
    """Return the folder of cached scores: ``$THANOS_CACHE/zero-shot``.

    Without ``THANOS_CACHE`` it is ``thanos/zero-shot`` in ``$XDG_CACHE_HOME``, or else in ``~/.cache``.
    """
    own = os.environ.get("THANOS_CACHE")
    return (
        Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "thanos"
    ) / "zero-shot"


def keys_of(
    source: ModelSource, tasks: dict[str, Any], limit: int | None, dtype: str, where: torch.device, *, bos: bool
) -> dict[str, str]:
    """Return task name → key of its score in the cache."""
    versions = [metadata.version("lm_eval"), metadata.version("transformers"), torch.__version__]
    common = [model_sha256(source), limit, dtype, where.type, *versions]
    common += ["add_bos_token"] if bos else []
    tokenizer = source.tokenizer()
    begin, usual = added_bos(tokenizer), defined_bos(tokenizer)
    common += ["begin", *begin] if begin and begin != (usual,) else []  # other scores were stored without it
    return {name: _key(task, common) for name, task in tasks.items()}


def _key(task: Any, common: list[Any]) -> str:
    """Return the hash of a task's settings and documents, and of ``common``: the values that all tasks' scores depend on."""
    digest = hashlib.sha256(json.dumps(common).encode())
    digest.update(json.dumps(task.dump_config(), sort_keys=True, default=str).encode())
    for document in task.eval_docs:
        digest.update(json.dumps(document, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def read_score(key: str) -> dict[str, Any] | None:
    """Return a cached score; None if there is none."""
    try:
        return json.loads((cache_folder() / f"{key}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_score(key: str, score: dict[str, Any]) -> None:
    """Write a score into the cache. An OSError is ignored."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"{key}.json", json.dumps(score).encode())
    except OSError:
        return  # a cache that cannot be written only costs time
