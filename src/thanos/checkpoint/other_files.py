"""The files of a model's folder that hold no weights."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

_NOT_COPIED = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".ckpt")
"""Endings of weight files in any format. The output has its own weights."""

_INDICES = (".safetensors.index.", ".bin.index.")
"""Parts of the names of weight indices, including those of variants (``model.safetensors.index.fp16.json``)."""


def is_weight_file(name: str) -> bool:
    """Return whether a file holds weights in any format, or is an index of such files."""
    name = name.lower()
    return name.endswith(_NOT_COPIED) or any(part in name for part in _INDICES)


def copy_others(source: Path, target: Path, skip: Collection[str]) -> None:
    """Copy every file that is neither a weight file, nor hidden, nor named in ``skip``.

    Args:
        source: folder of the model.
        target: folder that is written.
        skip: names of files that the caller writes.
    """
    for path in sorted(source.rglob("*")):
        inside = path.relative_to(source)
        if path.is_dir() or any(part.startswith(".") for part in inside.parts):
            continue
        if str(inside) in skip or is_weight_file(path.name):
            continue
        copy = target / inside
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
