"""Find the files of a folder that hold a model's weights. Every command reads the files that transformers reads."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thanos.errors import ModelError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

AGAIN = "the checkpoint is damaged: download or save it again"

_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_LORA = (".lora_A.", ".lora_B.", ".lora_embedding_A", ".lora_down.", ".lora_magnitude_vector")
"""Parts of the names of a low-rank adapter's tensors."""

MERGE = "merge it first if it belongs to the model"
"""What to do about an adapter among a model's weights."""


_POINTER = b"version https://git-lfs.github.com/"
"""First bytes of the text that Git puts in the place of a large file."""


def pointer_fault(path: Path) -> str:
    """Return the error line for a file that is a pointer of Git LFS, as in a clone without LFS; empty if it is none."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
    except OSError:
        return ""
    if start != _POINTER:
        return ""
    return f"{path} is a pointer of Git LFS, without the file's content; run git lfs pull in its folder, or download it again"


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The weights of a folder.

    Attributes:
        names: file names, in the index's order.
        index: bytes of the index file; None for a single file.
        shard_of: tensor name → file name, from the index; empty for a single file.
    """

    names: tuple[str, ...]
    index: bytes | None
    shard_of: dict[str, str]


def find_weights(folder: Path, name: str | None = None, *, listed: Collection[str] = ()) -> WeightFiles:
    """Return the files that hold the weights of a folder.

    Args:
        folder: holds ``model.safetensors``, or shards and ``model.safetensors.index.json``.
        name: name of the model, for messages; None for the folder.
        listed: paths of the model's files on the hub, which the folder may not have yet. They count as files of the folder.

    Raises:
        ModelError: there are no weights, the index is not valid, transformers would read other files, or there is an adapter.
    """
    name = name or str(folder)
    single, index, files = folder / SINGLE_NAME, folder / INDEX_NAME, _names(folder, listed)
    for path in (single, index):
        if path.is_symlink() and not path.exists():
            raise ModelError(f"{path} is a link to a file that does not exist; download or save it again")
    if index.is_file():
        data = index.read_bytes()
        shard_of = parse_index(index, data)
        found = WeightFiles(tuple(dict.fromkeys(shard_of.values())), data, shard_of)
    elif SINGLE_NAME in files:
        found = WeightFiles((SINGLE_NAME,), None, {})
    else:
        raise ModelError(_no_weights(files, name))
    # transformers reads the file that the config names, else the single file, else the index.
    if found.index is not None and SINGLE_NAME in files and found.names != (SINGLE_NAME,):
        raise ModelError(
            f"{name} holds weights twice: {INDEX_NAME} names {len(found.names)} other files, and transformers would read "
            f"{SINGLE_NAME} instead; {_from_hub(listed)}move the file that is not the model's to another folder"
        )
    stated = _stated_weights(folder)
    ours = SINGLE_NAME if found.index is None else INDEX_NAME
    if stated not in (None, ours):
        raise ModelError(
            f"{name}: config.json names the weights {stated!r} (transformers_weights), but the folder holds {ours}; remove "
            f"that line, or rename the file that is the model's to {ours}"
        )
    adapter = _adapter(folder, files, found.names)
    if adapter is not None:
        raise ModelError(
            f"{name} holds an adapter, {adapter}, and the base weights, {ours}: thanos ignores adapters, "
            "and transformers loads them if peft is installed; merge it first (peft's merge_and_unload, then save_pretrained), "
            f"or {_from_hub(listed)}move the adapter's files away"
        )
    return found


def parse_index(path: Path, data: bytes) -> dict[str, str]:
    """Return tensor → file name of a safetensors index.

    Args:
        path: path of the index, for messages.
        data: its bytes.

    Raises:
        ModelError: the data is no index, or it names a file outside the index's folder.
    """
    try:
        shard_of = json.loads(data)["weight_map"]
        if not shard_of or not all(isinstance(shard, str) and shard for shard in shard_of.values()):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} is not a valid safetensors index; {AGAIN}") from error
    for shard in dict.fromkeys(shard_of.values()):
        if Path(shard).name != shard or shard == "..":
            raise ModelError(
                f"{path} names {shard!r}, which is not in the same folder; move the shards into the folder of the index, and "
                "name them without a path"
            )
        if not shard.endswith(".safetensors"):
            raise ModelError(f"{path} names {shard!r}, which is not a .safetensors file; save the model as safetensors")
    return shard_of


def refuse_lone_adapter(folder: Path, name: str, *, listed: Collection[str] = ()) -> None:
    """Refuse a folder that holds an adapter and no base weights; the arguments are those of :func:`find_weights`.

    Raises:
        ModelError: there is one; the message says how to merge it.
    """
    files = _names(folder, listed)
    if SINGLE_NAME in files or INDEX_NAME in files:
        return
    adapter = _adapter(folder, files, ())
    if adapter is not None:
        raise ModelError(
            f"{name} holds an adapter, {adapter}, without the model that it belongs to; merge it first: "
            f"peft.AutoPeftModelForCausalLM.from_pretrained({name!r}).merge_and_unload().save_pretrained(FOLDER), and the "
            "tokenizer with it"
        )


def _stated_weights(folder: Path) -> str | None:
    """Return the weight file that config.json names for transformers; None if it names none."""
    try:
        config: Any = json.loads((folder / "config.json").read_bytes())
        return config.get("transformers_weights")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None  # the error is raised where the config is read


def adapter_beside(file: Path) -> str | None:
    """Return the name of an adapter's file in the folder of a file; None if there is none."""
    return next((name for name in _ADAPTERS if (file.parent / name).exists()), None)


def _names(folder: Path, listed: Collection[str]) -> set[str]:
    """Return the names of the files in a folder, and of those that the hub lists for its root."""
    here = folder.iterdir() if folder.is_dir() else ()
    return {path.name for path in here if path.exists()} | {path for path in listed if "/" not in path}


def _from_hub(listed: Collection[str]) -> str:
    """Return the first step of a remedy for a model that is on the hub."""
    return "download the model and " if listed else ""


def _adapter(folder: Path, files: Collection[str], weights: Iterable[str]) -> str | None:
    """Return the name of a file that belongs to an adapter; None if there is none."""
    for name in _ADAPTERS:
        if name in files:
            return name
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in weights and any(map(is_adapters, _keys(path))):
            return path.name
    return None


def is_adapters(key: str) -> bool:
    """Return whether a tensor belongs to a low-rank adapter, by its name."""
    return any(part in key for part in _LORA)


def adapter_without_effect(keys: Sequence[str], of: str = "") -> str:
    """Return the note on an adapter's tensors among a model's weights, without its end.

    ``keys`` are the tensors' names. ``of`` names the model if there may be several.
    """
    count = f"{len(keys)} {'tensor' if len(keys) == 1 else 'tensors'}"
    which = f"weights of {of}" if of else "weights"
    return f"the {which} contain an adapter ({count}, such as {keys[0]}), which transformers does not read: it has no effect"


def _keys(path: Path) -> list[str]:
    """Return the names of a safetensors file's tensors; an empty list if the file cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError):
        return []


def _no_weights(files: Collection[str], name: str) -> str:
    """Return the error line for a folder without readable weights, with its files and a remedy."""
    if any(fnmatch.filter(files, pattern) for pattern in _PICKLES):
        return (
            f"{name} holds its weights as pickle files, which can run any code when they are read; convert them "
            "where you trust them: AutoModelForCausalLM.from_pretrained(...).save_pretrained(FOLDER)"
        )
    lacking = f"{name} has no weights: neither {SINGLE_NAME} nor {INDEX_NAME}"
    others = sorted(fnmatch.filter(files, "*.safetensors*"))
    if not others:
        return lacking
    if any("-of-" in other and other.startswith("model-") for other in others):
        remedy = f"its shards need their index, {INDEX_NAME}: download it"
    elif any(other.startswith("model.") for other in others):
        remedy = "rename the files of the variant that you want to these names"
    else:
        remedy = "save the model with save_pretrained, or download the files that transformers reads"
    return f"{lacking}, only {', '.join(others[:3])}; {remedy}"
