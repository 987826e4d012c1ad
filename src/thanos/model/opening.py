"""Open a model without loading it: a meta model, and the checkpoint that holds its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from thanos.checkpoint.cast import in_dtype
from thanos.checkpoint.in_memory import LoadedCheckpoint
from thanos.checkpoint.layout import Checkpoint
from thanos.checkpoint.reader import SafetensorsCheckpoint
from thanos.errors import ModelError
from thanos.model.experts import Experts
from thanos.model.gguf_mapping import BY_BLOCK, gguf_checkpoint, untied_note
from thanos.model.loading import adapter_notes, load_model, parse_dtype
from thanos.model.meta_model import build_meta_model, persistent_tensors
from thanos.model.names import match_parameters, rename_keys, split_fused
from thanos.model.source import ModelSource
from thanos.model.unused import Unused

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


CONVERTED = "the checkpoint's tensors do not match the model's parameters one to one; transformers loads it whole"


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A meta model and its tensors.

    Attributes:
        source: folder or file of the model.
        meta_model: the model, its parameters on the meta device.
        checkpoint: the tensors.
        key_of: parameter name → tensor name in the checkpoint. Tied parameters have one entry.
        notes: remarks for the user on how the model was opened.
        written_in: dtype of an output's floating-point tensors; None for the dtypes of the source.
    """

    source: ModelSource
    meta_model: PreTrainedModel
    checkpoint: Checkpoint
    key_of: dict[str, str]
    notes: list[str]
    written_in: torch.dtype | None = None


def open_model(source: ModelSource, dtype: str = "auto", written_in: torch.dtype | None = None) -> OpenedModel:
    """Open a model so that its tensors can be read one by one.

    The tensors of a safetensors folder are read from disk if they match the model's parameters one to one. The tensors of a
    GGUF file are dequantised one by one if its architecture allows it. Otherwise transformers loads and converts the model, and
    the tensors are read from memory.

    Args:
        source: from :func:`~thanos.model.source.resolve_model`.
        dtype: dtype of the meta model: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``.
        written_in: dtype to which the floating-point tensors are converted when they are read; None to leave them.

    Raises:
        ModelError: a file is truncated or corrupt, or the model cannot be built.
    """
    by_tensor = _open_streamed if source.gguf is None else _open_gguf
    return by_tensor(source, dtype, written_in) or _open_whole(source, dtype, written_in)


def _open_streamed(source: ModelSource, dtype: str, written_in: torch.dtype | None) -> OpenedModel | None:
    """Match a meta model with the tensors on disk; return None if they do not correspond one to one."""
    config, stored = source.config(), SafetensorsCheckpoint(source.folder)
    resolved = _resolve_dtype(dtype, getattr(config, "dtype", None), stored)
    checkpoint = in_dtype(stored, written_in)
    meta_model = meta_model_of(source, config, resolved)
    prefix = getattr(meta_model, "base_model_prefix", "")
    parameters = persistent_tensors(meta_model)
    renamed, understood = rename_keys(meta_model, checkpoint.tensors)
    split_fused(meta_model, checkpoint, renamed)
    for stored_as in (renamed, {key: key for key in renamed.values()}):
        match = match_parameters(set(parameters), set(stored_as), prefix)
        if match is not None:
            key_of = {name: stored_as[match[name]] for name in parameters}  # in the model's order, in every process
            _check_tensors(source, parameters, checkpoint, key_of)
            return OpenedModel(source, meta_model, checkpoint, key_of, [], written_in)
    if not understood:
        return None
    missing = [name for name in parameters if name not in renamed]
    mixtures = tuple(f"{name}." for name, module in meta_model.named_modules() if isinstance(module, Experts))
    if missing and all(name.startswith(mixtures) for name in missing):
        raise ModelError(
            f"{source.name} has no tensor for {missing[0]}, although config.json requires it; download or save it again"
        )
    return None


def _open_gguf(source: ModelSource, dtype: str, written_in: torch.dtype | None) -> OpenedModel | None:
    """Match a meta model with the tensors of a GGUF file; return None if transformers has to load them."""
    config = source.config()
    config.dtype = torch.float32
    meta_model = meta_model_of(source, config, _resolve_dtype(dtype, torch.float32, None))
    dequantised = gguf_checkpoint(source.gguf_header, meta_model)
    if dequantised is None:
        return None
    checkpoint = in_dtype(dequantised, written_in)
    split_fused(meta_model, checkpoint, {name: name for name in checkpoint.tensors})
    key_of = {name: name for name in persistent_tensors(meta_model)}
    return OpenedModel(source, meta_model, checkpoint, key_of, _gguf_notes(source, whole=False), written_in)


def _gguf_notes(source: ModelSource, *, whole: bool) -> list[str]:
    """Return notes on a GGUF file; ``whole`` says whether transformers loads it whole."""
    header = source.gguf_header
    notes = []
    if whole:
        why = "its tensors do not match the model's parameters one to one"
        if header.architecture not in BY_BLOCK:
            why = (
                f"files of the architecture {header.architecture} are not read block by block, only those of "
                f"{', '.join(BY_BLOCK)}"
            )
        notes.append(f"transformers loads this GGUF file whole, in float32: {why}")
    notes += adapter_notes(source)
    if note := untied_note(header):
        notes.append(note)
    return notes


def meta_model_of(source: ModelSource, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build the meta model of a model; see :func:`~thanos.model.meta_model.build_meta_model`."""
    return build_meta_model(config, dtype, trust_remote_code=source.trust_remote_code, name=source.name)


def _check_tensors(
    source: ModelSource, parameters: dict[str, Tensor], checkpoint: Checkpoint, key_of: dict[str, str]
) -> None:
    """Refuse tensors whose shape or dtype is not the one that the config states."""
    for name, key in key_of.items():
        info, expected = checkpoint.tensors[key], parameters[name]
        if info.shape != tuple(expected.shape):
            raise ModelError(
                f"{source.name}: {key} has shape {list(info.shape)}, but config.json requires {list(expected.shape)}; the "
                "config belongs to another checkpoint"
            )
        if expected.is_floating_point() and not (info.dtype.is_floating_point and info.dtype.itemsize > 1):
            raise ModelError(
                f"{source.name}: {key} is {str(info.dtype).removeprefix('torch.')}, not a 16- to 64-bit floating-point tensor; "
                "give the model before quantisation"
            )


def _open_whole(source: ModelSource, dtype: str, written_in: torch.dtype | None) -> OpenedModel:
    """Load and convert the whole model with transformers; its tensors are then in memory."""
    dense = load_model(source, dtype="auto", device=torch.device("cpu"))
    resolved = _resolve_dtype(dtype, dense.dtype, None)
    meta_model = meta_model_of(source, dense.config, resolved)
    state = dense.state_dict()
    tensors = {name: state[name] for name in persistent_tensors(dense)}
    if source.gguf is None:
        tensors |= _prediction_layers(source, meta_model, tensors)
    checkpoint = in_dtype(LoadedCheckpoint(tensors), written_in)
    split_fused(meta_model, checkpoint, {name: name for name in checkpoint.tensors})
    key_of = {name: name for name in persistent_tensors(meta_model)}
    notes = [CONVERTED] if source.gguf is None else _gguf_notes(source, whole=True)
    return OpenedModel(source, meta_model, checkpoint, key_of, notes, written_in)


def _prediction_layers(
    source: ModelSource, meta_model: PreTrainedModel, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors on disk of layers for multi-token prediction that transformers did not load."""
    stored = SafetensorsCheckpoint(source.folder)
    unused = Unused(meta_model, stored.tensors, tensors)
    if any(unused.is_prediction(name) for name in tensors):
        return {}  # transformers runs these layers
    return {key: stored.read(key) for key in stored.tensors if unused.is_prediction(key)}


def running_dtype(source: ModelSource, dtype: str) -> torch.dtype:
    """Return the dtype in which a model runs. Raises ModelError if it is unknown, or a file is truncated or corrupt."""
    if source.gguf is not None:
        return _resolve_dtype(dtype, torch.float32, None)
    return _resolve_dtype(dtype, getattr(source.config(), "dtype", None), SafetensorsCheckpoint(source.folder))


def _resolve_dtype(dtype: str, stated: Any, checkpoint: Checkpoint | None) -> torch.dtype:
    """Return the dtype that the user chose; for ``auto`` the config's, or else the largest tensor's."""
    if dtype != "auto":
        return parse_dtype(dtype)
    if isinstance(stated, str):
        stated = getattr(torch, stated, None)
    if isinstance(stated, torch.dtype) and stated.is_floating_point:
        return stated
    assert checkpoint is not None
    return max(checkpoint.tensors.values(), key=lambda info: info.nbytes).dtype
