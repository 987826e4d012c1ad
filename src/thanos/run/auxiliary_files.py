"""The auxiliary files of a checkpoint: config, tokenizer, chat template, generation config, licence."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import torch

from thanos.checkpoint.other_files import is_weight_file
from thanos.events import LOG_NAME, RUN_NAME
from thanos.model.opening import OpenedModel
from thanos.model.source import ModelSource

_OURS = ("README.md", "pruning.json", "recipe.toml", LOG_NAME, RUN_NAME)


def copy_auxiliary_files(opened: OpenedModel, folder: Path) -> None:
    """Copy config, tokenizer, chat template and generation config unchanged. For a GGUF file, create them.

    Two exceptions in the config: a reference to Python code is removed if the code is missing, and the dtype is that of the
    weights that were written.
    """
    source = opened.source
    if source.gguf is not None:
        config = copy.deepcopy(opened.meta_model.config)
        config.dtype = opened.written_in or torch.float32
        config.architectures = [type(opened.meta_model).__name__]
        config.save_pretrained(folder)
        source.tokenizer().save_pretrained(folder)
        generation = source.generation_config()
        if generation is not None:
            generation.save_pretrained(folder)
        return
    for path in auxiliary_files(source):
        target = folder / path.relative_to(source.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    _drop_absent_code(folder / "config.json")
    if opened.written_in is not None:
        _state_dtype(folder / "config.json", str(opened.written_in).removeprefix("torch."))


def _drop_absent_code(config: Path) -> None:
    """Remove a config's reference to Python code that is not in its folder. transformers then uses its own code."""
    values = json.loads(config.read_text(encoding="utf-8"))
    named = values.get("auto_map")
    if not isinstance(named, dict):
        return
    modules = [reference.split(".")[0] for reference in named.values() if isinstance(reference, str)]
    if not all("--" in module or (config.parent / f"{module}.py").is_file() for module in modules):
        del values["auto_map"]
        config.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _state_dtype(config: Path, dtype: str) -> None:
    """State the dtype of the weights in a config, and in the configs of its parts that state one."""
    values = json.loads(config.read_text(encoding="utf-8"))
    parts = [part for part in values.values() if isinstance(part, dict)]
    for part in (values, *parts):
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = dtype
    if "torch_dtype" not in values:
        values["dtype"] = dtype
    config.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def auxiliary_files(source: ModelSource) -> list[Path]:
    """Return the files that :func:`copy_auxiliary_files` copies; none for a GGUF file, whose auxiliary files are created."""
    if source.gguf is not None:
        return []
    found = []
    for path in sorted(source.folder.iterdir()):
        if path.name in _OURS or path.name.startswith("."):
            continue
        if path.is_file() and not is_weight_file(path.name):
            found.append(path)
        elif path.is_dir() and path.name == "additional_chat_templates":
            found += sorted(file for file in path.rglob("*") if file.is_file())
    return found
