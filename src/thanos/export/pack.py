"""Pack a pruned checkpoint: its sparse linear layers take fewer bytes, and everything else stays as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from thanos._version import __version__
from thanos.checkpoint.layout import DEFAULT_SHARD_BYTES, TensorSpec, plan_layout
from thanos.checkpoint.other_files import copy_others
from thanos.checkpoint.reader import SafetensorsCheckpoint
from thanos.checkpoint.writer import CheckpointWriter
from thanos.errors import ModelError, UserError
from thanos.events import Event, Watcher
from thanos.export.candidates import LEAST_WEIGHTS, Candidate, find_candidates, matrix_parts, why_none
from thanos.export.folder import written
from thanos.export.record import CHANGED, NAME, LayerPacking, Packing, describe_dense
from thanos.model.opening import CONVERTED, open_model
from thanos.model.source import find_local, resolve_model
from thanos.run.model_card import PLAIN_USE, PLAIN_ZEROS
from thanos.sparse.card import HEADING, packed_section
from thanos.sparse.encoding import encode_strips, offsets_of
from thanos.sparse.storage import OFFSETS, ONE_DTYPE, WORDS, settings_of, tensor_specs
from thanos.system.documents import json_text
from thanos.system.event_stream import EventStream
from thanos.system.user_paths import model_name, output_path


def pack(
    model: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    least_weights: int = LEAST_WEIGHTS,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    trust_remote_code: bool = False,
    on_event: Watcher | None = None,
) -> Packing:
    """Write a packed copy of a pruned model, which transformers loads after ``import thanos.sparse``.

    Args:
        model: a hub name or a local folder of safetensors.
        out: the output folder. It appears only when it is complete.
        overwrite: replace ``out`` if it exists.
        least_weights: layers with fewer weights stay dense.
        max_shard_bytes: bytes of the largest file of weights.
        trust_remote_code: let transformers run Python code of the checkpoint.
        on_event: function that is called with each :class:`~thanos.events.Event`.

    Returns:
        What was packed, equal to ``packing.json`` in ``out``.

    Raises:
        UserError: the model cannot be read, no layer is worth packing, or ``out`` may not be written.
        ResourceError: memory or disk is exhausted.
    """
    model, out = model_name(model), output_path(out)
    if least_weights < 1:
        raise UserError(f"least_weights must be at least 1; got {least_weights}")
    local = find_local(model, trust_remote_code=trust_remote_code)
    with written(out, model=None if local is None else Path(model), overwrite=overwrite, what="pack") as folder:
        return _pack(
            model, folder, least_weights, max_shard_bytes, EventStream(on_event), trust_remote_code=trust_remote_code
        )


def _pack(
    model: str, folder: Path, least_weights: int, max_shard_bytes: int, emit: EventStream, *, trust_remote_code: bool
) -> Packing:
    emit(Event(kind="phase", phase="load"))
    source = resolve_model(model, trust_remote_code=trust_remote_code)
    if source.gguf is not None:
        raise ModelError(f"{source.name} is a GGUF file; give the folder of safetensors that thanos prune wrote")
    opened = open_model(source)
    if CONVERTED in opened.notes:
        raise ModelError(f"{source.name} cannot be packed: {CONVERTED}")
    stored = SafetensorsCheckpoint(source.folder)  # ``opened`` may have split fused tensors
    candidates = find_candidates(opened, stored, least_weights, emit)
    packed = {one.key: one for one in candidates if one.spec is not None}
    if not packed:
        raise ModelError(f"{source.name} has no layer that is worth packing{why_none(candidates)}")
    dtypes = sorted({str(one.spec.dtype) for one in packed.values() if one.spec is not None})
    if len(dtypes) > 1:
        raise ModelError(f"{source.name} has layers of {' and '.join(dtypes)}; {ONE_DTYPE}")
    specs = _packed_specs(stored, packed)
    layout = plan_layout(specs, max_shard_bytes)
    report = _describe(candidates, specs, stored, source.folder)
    writer = CheckpointWriter(layout, stored, folder)
    emit(Event(kind="phase", phase="write"))
    for done, (key, one) in enumerate(packed.items(), 1):
        _write_layer(writer, stored, key, one)
        emit(Event(kind="progress", phase="write", done=done, total=len(packed)))
    emit(Event(kind="phase", phase="finish"))
    writer.finish()
    copy_others(source.folder, folder, (*CHANGED, NAME))
    (folder / "config.json").write_text(json_text(_config(source.folder, candidates)), encoding="utf-8")
    (folder / "README.md").write_text(_card(source.folder, report), encoding="utf-8")
    report.write(folder / NAME)
    return report


def _write_layer(writer: CheckpointWriter, stored: SafetensorsCheckpoint, key: str, one: Candidate) -> None:
    """Encode and write a layer in parts, so that neither its dense nor its packed weight is in memory whole."""
    spec, counts, prefix = one.spec, one.counts, key.removesuffix(".weight")
    assert spec is not None
    assert counts is not None
    parts = (encode_strips(rows, spec, counts[:, first:last]) for first, last, rows in matrix_parts(stored, key))
    writer.write_parts(f"{prefix}.{WORDS}", parts)
    offsets = offsets_of(spec, counts)
    if offsets is not None:
        writer.write(f"{prefix}.{OFFSETS}", offsets)


def _packed_specs(stored: SafetensorsCheckpoint, packed: dict[str, Candidate]) -> dict[str, TensorSpec]:
    """Return the tensors of the packed folder, in the order of the dense one."""
    specs: dict[str, TensorSpec] = {}
    for name, info in stored.tensors.items():
        one = packed.get(name)
        if one is None or one.spec is None:
            specs[name] = info
        else:
            specs |= tensor_specs(name.removesuffix(".weight"), one.spec)
    return specs


def _describe(
    candidates: list[Candidate], specs: dict[str, TensorSpec], stored: SafetensorsCheckpoint, folder: Path
) -> Packing:
    return Packing(
        thanos_version=__version__,
        layers=[_record(one) for one in candidates],
        nbytes=sum(spec.nbytes for spec in specs.values()),
        dense_bytes=sum(info.nbytes for info in stored.tensors.values()),
        dense=describe_dense(stored.layout, folder),
    )


def _record(one: Candidate) -> LayerPacking:
    rows, columns = one.shape
    return LayerPacking(
        name=one.name,
        rows=rows,
        columns=columns,
        format="" if one.spec is None else one.spec.format,
        n=None if one.spec is None else one.spec.n or None,
        nbytes=one.dense_bytes if one.spec is None else one.spec.nbytes,
        dense_bytes=one.dense_bytes,
        reason=one.reason,
    )


def _config(folder: Path, candidates: list[Candidate]) -> dict[str, Any]:
    """Return the packed folder's ``config.json``."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    values.pop("transformers_weights", None)  # it may name a file that is not in the packed folder
    specs = {one.name: one.spec for one in candidates if one.spec is not None}
    return {**values, "quantization_config": settings_of(specs)}


def _card(folder: Path, report: Packing) -> str:
    """Return the dense folder's model card, which says how to load the packed model."""
    path = folder / "README.md"
    card = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    card = card.replace(PLAIN_USE, f"This is a packed checkpoint, which needs Thanos: see {HEADING.strip('# ')}.")
    card = card.replace(f"{PLAIN_ZEROS}\n\n", "")
    layers = sum(1 for layer in report.layers if layer.format)
    section = packed_section(layers, report.nbytes, report.dense_bytes, "the dense folder, byte by byte")
    return "\n\n".join(filter(None, (card.rstrip(), section)))
