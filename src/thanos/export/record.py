"""``packing.json``: the packed layers, and the data from which ``unpack`` restores the dense folder byte by byte."""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thanos.checkpoint.layout import Layout, ShardLayout, TensorInfo, TensorSpec
from thanos.checkpoint.reader import parse_shard
from thanos.checkpoint.weight_files import parse_index
from thanos.errors import ModelError
from thanos.system.documents import Document

NAME = "packing.json"

SCHEMA = 1

CHANGED = ("config.json", "README.md")
"""Files besides the weights that differ between the packed and the dense folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPacking:
    """One linear layer.

    Attributes:
        name: full module name.
        rows: outputs.
        columns: inputs.
        format: ``fixed``, ``bitmap``, or empty if the layer stays dense.
        n: for ``fixed``: values in 32 columns of a row; else None.
        nbytes: bytes of the weight in the packed folder.
        dense_bytes: bytes of the weight in the dense folder.
        reason: why the layer stays dense; empty if it is packed.
    """

    name: str
    rows: int
    columns: int
    format: str
    n: int | None
    nbytes: int
    dense_bytes: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing(Document):
    """The result of a run of ``pack``; the attributes are the keys of ``packing.json`` and of ``pack --json``.

    Attributes:
        thanos_version: version of this package.
        layers: the linear layers, in the model's order.
        nbytes: bytes of all tensors in the packed folder.
        dense_bytes: bytes of all tensors in the dense folder.
        dense: the dense folder's ``shards`` (name and header of each file, base64), ``index`` and ``files`` (bytes of
            ``config.json`` and ``README.md``, base64; null if there is none).
    """

    thanos_version: str
    layers: list[LayerPacking]
    nbytes: int
    dense_bytes: int
    dense: dict[str, Any]
    schema: int = SCHEMA


def describe_dense(layout: Layout, folder: Path) -> dict[str, Any]:
    """Return ``dense`` of a :class:`Packing` for a folder and the layout of its weights."""
    files = {name: _encode((folder / name).read_bytes()) for name in CHANGED if (folder / name).is_file()}
    return {
        "shards": [{"name": shard.name, "header": _encode(shard.header)} for shard in layout.shards],
        "index": None if layout.index is None else _encode(layout.index),
        "files": {name: files.get(name) for name in CHANGED},
    }


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


@dataclass(frozen=True, slots=True)
class DenseFolder:
    """The dense folder as ``packing.json`` describes it, checked.

    Attributes:
        layout: layout of its weights.
        files: name → bytes of the files in :data:`CHANGED` that it has.
    """

    layout: Layout
    files: dict[str, bytes]


def read_dense(folder: Path, tensors: dict[str, TensorSpec]) -> DenseFolder | None:
    """Return the dense folder that ``packing.json`` in the packed folder describes; None without the file.

    ``tensors`` are the dtypes and shapes that the dense folder must hold. Raises ModelError if the file is damaged, or
    describes other tensors.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    damaged = f"{path} is damaged or of another version; move it away: then unpack gives the same tensors in new files"
    try:
        values = json.loads(path.read_bytes())
        if values["schema"] != SCHEMA:
            raise ValueError("schema")
        dense = values["dense"]
        shards = [(_plain_name(shard["name"]), _decode(shard["header"])) for shard in dense["shards"]]
        index = None if dense["index"] is None else _decode(dense["index"])
        files = {name: _decode(dense["files"][name]) for name in CHANGED if dense["files"].get(name) is not None}
        if not isinstance(json.loads(files["config.json"]), dict):
            raise ValueError("config.json")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, binascii.Error) as error:
        raise ModelError(damaged) from error
    layout = _checked_layout(path, shards, index)
    if layout is None or {name: (i.dtype, i.shape) for name, i in layout.tensors.items()} != {
        name: (spec.dtype, spec.shape) for name, spec in tensors.items()
    }:
        raise ModelError(damaged)
    return DenseFolder(layout, files)


def _checked_layout(path: Path, shards: list[tuple[str, bytes]], index: bytes | None) -> Layout | None:
    """Return the layout of headers, each checked as that of a file; None if they contradict each other."""
    laid: list[ShardLayout] = []
    infos: dict[str, TensorInfo] = {}
    for name, header in shards:
        if len(header) < 8 or int.from_bytes(header[:8], "little") != len(header) - 8:
            return None
        shard, held = parse_shard(path / name, header)
        if infos.keys() & held.keys() or any(name == other.name for other in laid):
            return None
        laid.append(shard)
        infos |= held
    if index is not None and parse_index(path, index) != {name: info.shard for name, info in infos.items()}:
        return None
    return Layout(tuple(laid), infos, index) if laid else None


def _plain_name(name: Any) -> str:
    if (
        not isinstance(name, str)
        or Path(name).name != name
        or not name.endswith(".safetensors")
        or name.startswith(".")
    ):
        raise ValueError(f"shard {name!r}")
    return name


def _decode(text: Any) -> bytes:
    return base64.b64decode(text, validate=True)
