"""What stands beside the weights of a checkpoint: config, tokenizer, chat template, generation config, licence."""

from __future__ import annotations

import shutil
from pathlib import Path

from thanos.events import LOG_NAME
from thanos.model.opening import OpenedModel
from thanos.model.source import ModelSource

_NOT_COPIED = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".ckpt")
"""Weights in any format: the output has its own."""

_OURS = ("README.md", "pruning.json", "recipe.toml", LOG_NAME)


def copy_companions(opened: OpenedModel, folder: Path) -> None:
    """Put config, tokenizer, chat template and generation config beside the weights, unchanged where they are files."""
    source = opened.source
    if source.gguf is not None:
        config = opened.skeleton.config
        config.architectures = [type(opened.skeleton).__name__]
        config.save_pretrained(folder)
        source.tokenizer().save_pretrained(folder)
        generation = source.generation_config()
        if generation is not None:
            generation.save_pretrained(folder)
        return
    for path in companion_files(source):
        target = folder / path.relative_to(source.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def companion_files(source: ModelSource) -> list[Path]:
    """Return the files that :func:`copy_companions` copies; none for a GGUF file, whose companions are made."""
    if source.gguf is not None:
        return []
    found = []
    for path in sorted(source.folder.iterdir()):
        if path.name in _OURS or path.name.startswith("."):
            continue
        if path.is_file() and not path.name.endswith(_NOT_COPIED):
            found.append(path)
        elif path.is_dir() and path.name == "additional_chat_templates":
            found += sorted(file for file in path.rglob("*") if file.is_file())
    return found
