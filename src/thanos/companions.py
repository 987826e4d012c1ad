"""What stands beside the weights of a checkpoint: config, tokenizer, chat template, generation config, licence."""

from __future__ import annotations

import shutil
from pathlib import Path

from thanos.events import LOG_NAME
from thanos.opening import OpenedModel

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
    for path in sorted(source.folder.iterdir()):
        if path.name in _OURS or path.name.startswith("."):
            continue
        if path.is_file() and not path.name.endswith(_NOT_COPIED):
            shutil.copyfile(path, folder / path.name)
        elif path.is_dir() and path.name == "additional_chat_templates":
            shutil.copytree(path, folder / path.name)
