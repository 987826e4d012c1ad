"""Turn a packed folder into the dense folder that it was made from."""

from __future__ import annotations

import json
from pathlib import Path

from thanos.checkpoint.layout import DEFAULT_SHARD_BYTES, TensorSpec, plan_layout
from thanos.checkpoint.other_files import copy_others
from thanos.checkpoint.reader import SafetensorsCheckpoint
from thanos.checkpoint.writer import CheckpointWriter
from thanos.errors import ModelError
from thanos.events import Event, Watcher
from thanos.export.folder import written
from thanos.export.record import CHANGED, NAME, DenseFolder, read_dense
from thanos.sparse.formats import PackedSpec, decode, strip_parts
from thanos.sparse.storage import OFFSETS, WORDS, find_prefixes, is_packed, parse_settings, read_weight
from thanos.system.documents import json_text
from thanos.system.event_stream import EventStream
from thanos.system.user_paths import model_name, output_path


def unpack(
    packed: str | Path, out: str | Path, *, overwrite: bool = False, on_event: Watcher | None = None
) -> DenseFolder | None:
    """Write the dense folder of a packed one.

    With the ``packing.json`` that ``pack`` wrote, the result equals the dense folder byte by byte. Without it, as after
    ``save_pretrained`` of a loaded model, the tensors are the same, in newly planned files.

    Args:
        packed: a local folder that ``pack`` wrote.
        out: the output folder. It appears only when it is complete.
        overwrite: replace ``out`` if it exists.
        on_event: function that is called with each :class:`~thanos.events.Event`.

    Returns:
        The dense folder's layout and files, if ``packing.json`` states them; else None.

    Raises:
        UserError: the folder is not packed or damaged, or ``out`` may not be written.
        ResourceError: memory or disk is exhausted.
    """
    name, out = model_name(packed, "PACKED"), output_path(out)
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{name} is not a folder with a config.json; give a folder that thanos pack wrote")
    config = _read_config(folder, name)
    if not is_packed(config):
        raise ModelError(
            f"{name} is not packed (its config.json has no quantization_config of thanos), so there is nothing to unpack"
        )
    specs = parse_settings(config["quantization_config"], name)
    with written(out, model=folder, overwrite=overwrite, what="unpack") as target:
        return _unpack(folder, name, specs, target, EventStream(on_event))


def _unpack(
    folder: Path, name: str, specs: dict[str, PackedSpec], target: Path, emit: EventStream
) -> DenseFolder | None:
    emit(Event(kind="phase", phase="load"))
    stored = SafetensorsCheckpoint(folder)
    prefixes = find_prefixes(specs, stored, name)
    tensors = _dense_specs(stored, {prefixes[layer]: spec for layer, spec in specs.items()}, name)
    dense = read_dense(folder, tensors)
    layout = plan_layout(tensors, DEFAULT_SHARD_BYTES) if dense is None else dense.layout
    writer = CheckpointWriter(layout, stored, target)
    emit(Event(kind="phase", phase="write"))
    for done, (layer, spec) in enumerate(specs.items(), 1):
        prefix = prefixes[layer]
        packed = read_weight(stored, prefix, spec, name)
        writer.write_parts(f"{prefix}.weight", (decode(packed, *part) for part in strip_parts(spec.rows, spec.columns)))
        emit(Event(kind="progress", phase="write", done=done, total=len(specs)))
    emit(Event(kind="phase", phase="finish"))
    writer.finish()
    if dense is None:
        copy_others(folder, target, ("config.json", NAME))
        config = _read_config(folder, name)
        del config["quantization_config"]
        (target / "config.json").write_text(json_text(config), encoding="utf-8")
    else:
        copy_others(folder, target, (*CHANGED, NAME))
        for file, content in dense.files.items():
            (target / file).write_bytes(content)
    return dense


def _dense_specs(stored: SafetensorsCheckpoint, packed: dict[str, PackedSpec], name: str) -> dict[str, TensorSpec]:
    """Return the tensors of the dense folder, in the order of the packed one.

    ``packed`` maps the prefix of a layer's tensors to its spec. ``name`` is the model's, for messages.
    """
    specs: dict[str, TensorSpec] = {}
    for key, info in stored.tensors.items():
        prefix, _, last = key.rpartition(".")
        if last not in (WORDS, OFFSETS):
            specs[key] = TensorSpec(info.dtype, info.shape)
        elif last == WORDS:
            spec = packed[prefix]
            specs[f"{prefix}.weight"] = TensorSpec(spec.dtype, (spec.rows, spec.columns))
    for prefix in packed:
        if f"{prefix}.weight" in stored.tensors:
            raise ModelError(f"{name} holds {prefix} both packed and dense; the packed model is damaged: pack it again")
    return specs


def _read_config(folder: Path, name: str) -> dict[str, object]:
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{name}/config.json is not valid JSON: {error}") from error
    return values
