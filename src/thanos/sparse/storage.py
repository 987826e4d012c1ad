"""Packed matrices in safetensors files: names, the entry in ``config.json``, and checks of what is read.

docs/formats.md describes the layout. A packed weight is used only after checks of sizes, dtypes, offsets, the number of bits in
each mask word, and the zeros outside the matrix. So no kernel can read or write outside its tensors.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, TypeGuard

import torch

from thanos.checkpoint.layout import Checkpoint, TensorSpec
from thanos.errors import ModelError
from thanos.sparse import tiles
from thanos.sparse.formats import (
    DTYPES,
    MOST_UNITS,
    VERSION,
    PackedSpec,
    PackedWeight,
    masks_and_tails,
    padding_is_zero,
    tile_sizes,
)
from thanos.sparse.tiles import MOST_TAIL, SIDE, UNIT, tile_words

METHOD = "thanos_sparse"
"""Value of ``quant_method`` in ``config.json``."""

WORDS, OFFSETS = "weight_words", "weight_offsets"
"""Last parts of the names of a packed layer's tensors, which replace ``weight``."""

_MOST = 1 << 31
"""The numbers of rows and of columns must be below this."""

ONE_DTYPE = "a model runs in one dtype: save the dense model in one, then pack it"
"""What to do about packed layers of two dtypes."""

_DAMAGED = "the packed model is damaged: pack it again"


def settings_of(specs: Mapping[str, PackedSpec]) -> dict[str, Any]:
    """Return the ``quantization_config`` of ``config.json``.

    Args:
        specs: layer's full module name → spec.
    """
    return {
        "quant_method": METHOD,
        "format_version": VERSION,
        "layers": {name: _entry(spec) for name, spec in specs.items()},
    }


def _entry(spec: PackedSpec) -> dict[str, Any]:
    size = {"n": spec.n} if spec.format == "fixed" else {"words": spec.words}
    dtype = next(name for name, dtype in DTYPES.items() if dtype == spec.dtype)
    return {"format": spec.format, "shape": [spec.rows, spec.columns], "dtype": dtype, **size}


def is_packed(config: Any) -> bool:
    """Return whether the values of a ``config.json`` are those of a packed model."""
    settings = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(settings, dict) and settings.get("quant_method") == METHOD


def parse_settings(settings: Any, where: str) -> dict[str, PackedSpec]:
    """Return layer name → spec of a ``quantization_config``.

    Args:
        settings: the JSON values.
        where: name of the model, for messages.

    Raises:
        ModelError: the version is not supported, or an entry is not valid.
    """
    version = settings.get("format_version") if isinstance(settings, Mapping) else None
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ModelError(
            f"{where} is packed in version {version!r} of the format; this version of thanos reads 1 to {VERSION}: upgrade "
            "thanos, or pack the model again"
        )
    layers = settings.get("layers")
    if not isinstance(layers, Mapping) or not layers:
        raise ModelError(f"{where}: config.json lists no packed layers; {_DAMAGED}")
    return {name: _parse_entry(name, entry, where, version) for name, entry in layers.items()}


def _parse_entry(name: Any, entry: Any, where: str, version: int) -> PackedSpec:
    def refuse(what: str) -> ModelError:
        return ModelError(f"{where}: config.json gives the packed layer {name} {what}; {_DAMAGED}")

    if not isinstance(name, str) or not name.isprintable():  # it would break the lines of messages
        raise ModelError(f"{where}: config.json lists a packed layer {name!r}, which cannot be a name; {_DAMAGED}")
    if not name or not isinstance(entry, Mapping):
        raise refuse("no valid entry")
    if entry.get("format") not in ("fixed", "bitmap"):
        raise refuse(f"the format {entry.get('format')!r}, not fixed or bitmap")
    if entry.get("dtype") not in list(DTYPES):
        raise refuse(f"the dtype {entry.get('dtype')!r}, not {' or '.join(DTYPES)}")
    shape = entry.get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or not all(_is_size(size) for size in shape):
        raise refuse(f"the shape {shape!r}, not the numbers of rows and of columns")
    rows, columns = shape
    count = -(-rows // SIDE) * -(-columns // SIDE)
    if entry["format"] == "fixed":
        n = entry.get("n")
        if type(n) is not int or not 1 <= n < SIDE:
            raise refuse(f"n = {n!r}, not 1 to {SIDE - 1}")
        return PackedSpec("fixed", rows, columns, DTYPES[entry["dtype"]], n, count * tile_words(n))
    words = entry.get("words")
    if type(words) is not int or not tile_words(0) * count <= words <= tile_words(SIDE) * count:
        raise refuse(f"{words!r} words, which do not suit {rows} × {columns}")
    return PackedSpec("bitmap", rows, columns, DTYPES[entry["dtype"]], 0, words, version)


def _is_size(value: Any) -> TypeGuard[int]:
    return type(value) is int and 1 <= value < _MOST


def tensor_specs(prefix: str, spec: PackedSpec) -> dict[str, TensorSpec]:
    """Return the stored tensors of a packed layer: name → dtype and shape.

    Args:
        prefix: name of the layer in the checkpoint.
        spec: spec of its weight.
    """
    tensors = {f"{prefix}.{WORDS}": TensorSpec(torch.int32, (spec.words,))}
    if spec.offsets:
        tensors[f"{prefix}.{OFFSETS}"] = TensorSpec(torch.int32, (spec.offsets,))
    return tensors


def find_prefixes(specs: Mapping[str, PackedSpec], checkpoint: Checkpoint, where: str) -> dict[str, str]:
    """Return layer name → prefix of its tensors in a checkpoint.

    The first part of a name (``model``) may exist only in the model or only in the checkpoint.

    Raises:
        ModelError: tensors and layers do not correspond, or a tensor has another dtype or shape than the spec says.
    """
    stored = {name.removesuffix(f".{WORDS}") for name in checkpoint.tensors if name.endswith(f".{WORDS}")}
    found: dict[str, str] = {}
    for name, spec in specs.items():
        candidates = [one for one in (name, name.partition(".")[2]) if one in stored]
        candidates += [one for one in stored if one.partition(".")[2] == name]
        if not candidates:
            raise ModelError(f"{where} has no tensor {name}.{WORDS}, though config.json lists the layer; {_DAMAGED}")
        found[name] = candidates[0]
        for key, expected in tensor_specs(found[name], spec).items():
            actual = checkpoint.tensors.get(key)
            if actual is None or (actual.dtype, actual.shape) != (expected.dtype, expected.shape):
                got = "is missing" if actual is None else f"is {_words(actual)}"
                raise ModelError(f"{where}: {key} {got}, but config.json asks for {_words(expected)}; {_DAMAGED}")
    expected_names = {key for name, spec in specs.items() for key in tensor_specs(found[name], spec)}
    left = {name for name in checkpoint.tensors if name.endswith((f".{WORDS}", f".{OFFSETS}"))} - expected_names
    if left:
        raise ModelError(f"{where}: config.json lists no packed layer that has a tensor {min(left)}; {_DAMAGED}")
    if len(set(found.values())) < len(found):
        raise ModelError(f"{where}: config.json lists two packed layers for one tensor; {_DAMAGED}")
    return found


def check_stored(specs: Collection[PackedSpec], tensors: Mapping[str, TensorSpec], where: str) -> None:
    """Check that files hold the packed tensors of these specs and no others, whatever the names of the layers are.

    Args:
        specs: the specs of all packed layers.
        tensors: name → dtype and shape of each tensor of the files.
        where: name of the model, for messages.

    Raises:
        ModelError: a tensor is missing, has another dtype or shape, belongs to no layer, or is also stored dense.
    """
    listed = Counter(part for spec in specs for part in tensor_specs("", spec).items())
    for name, info in tensors.items():
        prefix, _, last = name.rpartition(".")
        if last not in (WORDS, OFFSETS):
            continue
        kind = (f".{last}", TensorSpec(info.dtype, info.shape))
        if not listed[kind]:
            raise ModelError(f"{where}: config.json lists no layer for {name}, {_words(kind[1])}; {_DAMAGED}")
        listed[kind] -= 1
        if f"{prefix}.weight" in tensors:
            raise ModelError(f"{where} holds {prefix} both packed and dense; {_DAMAGED}")
    for (last, spec), count in listed.items():
        if count:
            raise ModelError(
                f"{where} lacks a tensor {last[1:]}, {_words(spec)}, of a layer in config.json; {_DAMAGED}"
            )


def _words(spec: TensorSpec) -> str:
    return f"{str(spec.dtype).removeprefix('torch.')} {list(spec.shape)}"


def read_weight(checkpoint: Checkpoint, prefix: str, spec: PackedSpec, where: str) -> PackedWeight:
    """Read and check one packed matrix. :func:`find_prefixes` must have checked its tensors' shapes and dtypes.

    Raises:
        ModelError: see :func:`check_weight`.
    """
    offsets = checkpoint.read(f"{prefix}.{OFFSETS}") if spec.offsets else None
    packed = as_latest(PackedWeight(spec, checkpoint.read(f"{prefix}.{WORDS}"), offsets), f"{where}: {prefix}")
    check_weight(packed, f"{where}: {prefix}")
    return packed


def as_latest(packed: PackedWeight, name: str) -> PackedWeight:
    """Return a matrix with the offsets of this version's layout. The words are the same in all versions.

    Args:
        packed: the matrix; its content need not be valid.
        name: name of the layer, for messages.

    Raises:
        ModelError: an offset is not one of the older version.
    """
    spec, offsets = packed.spec, packed.offsets
    if spec.version == VERSION or offsets is None:
        return packed
    if bool(((offsets < 0) | (offsets > MOST_UNITS)).any()):
        raise ModelError(f"{name} has offsets that do not suit its tiles; {_DAMAGED}")
    return PackedWeight(dataclasses.replace(spec, version=VERSION), packed.words, 4 * offsets)


def check_weight(packed: PackedWeight, name: str) -> None:
    """Check the content of a packed matrix in this version's layout, on any device.

    Args:
        packed: the matrix; its content need not be valid.
        name: name of the layer, for messages.

    Raises:
        ModelError: a size or dtype is not the spec's, an offset is impossible, the masks of a tile do not match its size by the
            offsets, the end of a tail is not zero, or an entry beyond the matrix is not zero.
    """
    spec, offsets = packed.spec, packed.offsets
    present = 0 if offsets is None else offsets.numel()
    kinds = {packed.words.dtype} | ({offsets.dtype} if offsets is not None else set())
    if packed.words.shape != (spec.words,) or present != spec.offsets or kinds != {torch.int32}:
        raise ModelError(
            f"{name} has {packed.words.numel()} words and {present} offsets, other than config.json says; {_DAMAGED}"
        )
    if offsets is not None:
        counts, tails = tile_sizes(packed)
        valid = (counts >= 0).all() & (counts + tails <= SIDE).all() & (tails <= MOST_TAIL).all()
        valid = valid & (offsets[0] >= 0) & (offsets[0] < 4)  # the first tile begins at unit 0
        if not bool(valid) or spec.words % UNIT or int(offsets[-1]) * UNIT != 4 * spec.words:
            raise ModelError(f"{name} has offsets that do not suit its tiles; {_DAMAGED}")
    for n, masks, tails in masks_and_tails(packed):
        surplus = tiles.count_bits(masks) - n
        used, there = surplus.sum(1), tails.shape[1]
        if bool((surplus < 0).any() | (used > there).any() | (used <= there - SIDE).any()):
            raise ModelError(f"{name} has masks that do not suit their tiles of {n} values per row; {_DAMAGED}")
        if bool((tails.ne(0) & (torch.arange(there, device=used.device) >= used[:, None])).any()):
            raise ModelError(f"{name} has values after the last one of a tile; {_DAMAGED}")
    if not padding_is_zero(packed):
        raise ModelError(f"{name} has entries beyond its last row or column; {_DAMAGED}")
