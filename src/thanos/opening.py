"""Opening a model without loading it: a skeleton, and the tensors that belong to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from thanos.checkpoint import Checkpoint, LoadedCheckpoint, SafetensorsCheckpoint, match_parameters
from thanos.pretrained import ModelSource, load_model
from thanos.structure import build_skeleton
from thanos.weights import persistent_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

CONVERTED = "the checkpoint's tensors are not one to one the model's parameters; transformers loads it whole"


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A skeleton and its tensors.

    Attributes:
        source: where they came from.
        skeleton: the model, its parameters on the meta device.
        checkpoint: hands out tensors.
        key_of: parameter name → tensor name in the checkpoint; tied parameters under one name.
        notes: what a person should know about the way it was opened.
    """

    source: ModelSource
    skeleton: PreTrainedModel
    checkpoint: Checkpoint
    key_of: dict[str, str]
    notes: list[str]


def open_model(source: ModelSource, dtype: str = "auto") -> OpenedModel:
    """Open a model for reading tensor by tensor.

    A safetensors folder whose tensors are one to one the model's parameters is read from disk; anything else is loaded and
    converted by transformers, and its tensors come from memory.

    Args:
        source: from :func:`~thanos.pretrained.resolve_model`.
        dtype: of the skeleton: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        ModelError: a file is truncated or corrupt, or the model cannot be built.
    """
    if source.gguf is not None:
        return _open_whole(source, dtype, [])
    return _open_streamed(source, dtype) or _open_whole(source, dtype, [CONVERTED])


def _open_streamed(source: ModelSource, dtype: str) -> OpenedModel | None:
    """Pair a skeleton with the tensors on disk; None where they do not correspond one to one."""
    config, checkpoint = source.config(), SafetensorsCheckpoint(source.folder)
    resolved = _resolve_dtype(dtype, getattr(config, "dtype", None), checkpoint)
    skeleton = build_skeleton(config, resolved, trust_remote_code=source.trust_remote_code)
    prefix = getattr(skeleton, "base_model_prefix", "")
    key_of = match_parameters(set(persistent_names(skeleton)), set(checkpoint.tensors), prefix)
    return None if key_of is None else OpenedModel(source, skeleton, checkpoint, key_of, [])


def _open_whole(source: ModelSource, dtype: str, notes: list[str]) -> OpenedModel:
    """Let transformers load and convert the whole model, and serve its tensors from memory."""
    dense = load_model(source, dtype="auto", device=torch.device("cpu"))
    resolved = _resolve_dtype(dtype, dense.dtype, None)
    skeleton = build_skeleton(dense.config, resolved, trust_remote_code=source.trust_remote_code)
    names, state = persistent_names(skeleton), dense.state_dict()
    checkpoint = LoadedCheckpoint({name: state[name] for name in names})
    return OpenedModel(source, skeleton, checkpoint, {name: name for name in names}, notes)


def _resolve_dtype(asked: str, stated: Any, checkpoint: SafetensorsCheckpoint | None) -> torch.dtype:
    """The dtype that the model runs in: the one asked for, else what the config states, else the largest tensor's."""
    if asked != "auto":
        return _DTYPES[asked]
    if isinstance(stated, str):
        stated = getattr(torch, stated, None)
    if isinstance(stated, torch.dtype) and stated.is_floating_point:
        return stated
    assert checkpoint is not None
    return max(checkpoint.tensors.values(), key=lambda info: info.nbytes).dtype
