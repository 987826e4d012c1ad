"""Load a whole model with transformers, and read its end-of-text token and context length."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from thanos.checkpoint.gguf_files import describe_split_file, require_packages
from thanos.checkpoint.reader import SafetensorsCheckpoint
from thanos.checkpoint.weight_files import MERGE, adapter_beside, adapter_without_effect, is_adapters
from thanos.errors import DataError, ModelError, is_out_of_memory
from thanos.model.gguf_mapping import gguf_checkpoint
from thanos.model.meta_model import build_fused_model, tensor_owners
from thanos.model.source import ModelSource
from thanos.model.transformers_errors import brings_code, describe_building_error, describe_import_error, first_line
from thanos.system.suggestions import near_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    source: ModelSource, *, dtype: str | torch.dtype = "auto", device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Load the whole model, in eval mode and without gradients.

    A GGUF file is read tensor by tensor if its architecture allows it: then the model is in memory once, in its own dtype.

    Args:
        source: from :func:`resolve_model`.
        dtype: ``auto`` (the checkpoint's; float32 for a GGUF file), ``float32``, ``bfloat16``, ``float16`` or a dtype.
        device: device of the loaded model.

    Raises:
        ModelError: a file is truncated or corrupt, or does not fit the config.
    """
    from transformers import AutoModelForCausalLM

    if isinstance(dtype, str) and dtype != "auto":
        dtype = parse_dtype(dtype)
    if source.gguf is not None:
        require_packages()
        dtype = torch.float32 if not isinstance(dtype, torch.dtype) else dtype
        loaded = _load_gguf(source, dtype, torch.device(device))
        if loaded is not None:
            return loaded
        if parts := _split_count(source):  # transformers would read this part alone
            raise ModelError(describe_split_file(Path(source.name), parts))
        if adapter := adapter_beside(source.gguf):
            raise ModelError(
                f"{source.name}: transformers has to load this file, and where peft is installed, it would apply the adapter "
                f"in the same folder too, {adapter}; move the file into a folder of its own"
            )
        arguments = {"config": source.config()}  # read once, because reading it from a GGUF file takes seconds
    else:
        SafetensorsCheckpoint(source.folder)
        arguments = {"use_safetensors": True}
    try:
        with _loader(source, device):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source.folder, dtype=dtype, output_loading_info=True, **arguments, **source._arguments()
            )
    except (Exception, SystemExit) as error:  # a checkpoint's own code may raise anything
        if is_out_of_memory(error):
            raise
        line = f"{source.name} cannot be loaded: {first_line(error)}"
        if "ignore_mismatched_sizes" in str(error):  # transformers refers to lines that it printed
            shapes = "tensors have other shapes than config.json requires"
            line = f"{source.name}: {shapes}; the config belongs to another checkpoint"
        own = source.gguf is None and brings_code(source.config())
        if own or (source.gguf is None and not isinstance(error, ValueError | OSError | RuntimeError)):  # not its files
            line = describe_building_error(source.name, source.config(), error)
        raise ModelError(describe_import_error(source.name, error) or line) from error
    model, info = loaded
    absent = sorted(info["missing_keys"])
    if absent:  # transformers fills them with random numbers
        raise ModelError(
            f"{source.name} lacks {len(absent)} of the model's tensors, for example {absent[0]}; config.json belongs to "
            "another checkpoint, or the checkpoint is damaged"
        )
    if source.gguf is not None:
        # The weights are plain tensors now. A saved folder that says otherwise could not be loaded.
        for owner, mark in (
            (model.config, "quantization_config"),
            (model, "hf_quantizer"),
            (model, "quantization_method"),
        ):
            if hasattr(owner, mark):
                delattr(owner, mark)
        model.is_quantized = False
    return model.to(device).eval().requires_grad_(False)


def _load_gguf(source: ModelSource, dtype: torch.dtype, device: torch.device) -> PreTrainedModel | None:
    """Load a model from a GGUF file tensor by tensor, in chunks; None if transformers has to load it."""
    config = source.config()
    config.dtype = dtype
    model: Any = build_fused_model(config, dtype, name=source.name)
    checkpoint = gguf_checkpoint(source.gguf_header, model)
    if checkpoint is None:
        return None
    owners = tensor_owners(model)
    for name in checkpoint.tensors:
        module, attribute = owners[name][0]
        like = module._parameters[attribute]
        assert like is not None
        value, done = torch.empty(like.shape, dtype=like.dtype, device=device), 0
        for chunk in checkpoint.chunks(name):
            value.view(-1)[done : done + len(chunk)] = chunk.to(like.dtype)
            done += len(chunk)
        parameter = torch.nn.Parameter(value, requires_grad=False)
        for owner, attribute in owners[name]:
            owner._parameters[attribute] = parameter
    return model.to(device)


def adapter_notes(source: ModelSource) -> list[str]:
    """Return the note on an adapter without effect; empty if there is none.

    It is in the folder of a GGUF file, or among the weights of a folder of safetensors.
    """
    if source.gguf is not None:
        adapter = adapter_beside(source.gguf)
        applied = (
            f"the adapter in the folder of {source.gguf.name}, {adapter}, is not applied: only the GGUF file is read"
        )
        return [applied] if adapter else []
    keys = sorted(key for key in SafetensorsCheckpoint(source.folder).tensors if is_adapters(key))
    if not keys or _has_own_adapter(source):
        return []
    return [f"{adapter_without_effect(keys, Path(source.name).name)}; {MERGE}"]


def _has_own_adapter(source: ModelSource) -> bool:
    """Return whether the model's class has an adapter's parameters itself, so that transformers reads them."""
    trust = source.trust_remote_code
    model = build_fused_model(source.config(), torch.float32, trust_remote_code=trust, name=source.name)
    return any(is_adapters(name) for name, _ in model.named_parameters())


def _split_count(source: ModelSource) -> int:
    """Return the number of parts of a GGUF file, as its header states it; 0 for a folder, or a file in one part."""
    count = source.gguf_header.metadata.get("split.count", 0) if source.gguf is not None else 0
    return count if type(count) is int and count > 1 else 0


def _loader(source: ModelSource, device: torch.device | str) -> AbstractContextManager[None]:
    """Return a context in which transformers loads the model: for a packed one, with the loader of this package."""
    if not source.is_packed:
        return nullcontext()
    from thanos.sparse.loader import bound_for

    return bound_for(device)


def parse_dtype(name: str) -> torch.dtype:
    """Return the dtype called ``float32``, ``bfloat16`` or ``float16``. Raises ModelError for another name."""
    if name not in _DTYPES:
        hint = near_dtype(name, _DTYPES)
        raise ModelError(f"dtype {name!r} is unknown; choose one of auto, {', '.join(_DTYPES)}{hint}")
    return _DTYPES[name]


def end_of_text_id(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int:
    """Return the token that separates documents: the tokenizer's end of sequence, else the config's, else raise DataError."""
    for candidate in (getattr(tokenizer, "eos_token_id", None), getattr(config, "eos_token_id", None)):
        if isinstance(candidate, list | tuple) and candidate:
            candidate = candidate[0]
        if isinstance(candidate, int):
            return candidate
    raise DataError(
        "neither the tokenizer nor the config names an end-of-text token, which separates documents; set "
        "eos_token_id in the model's config.json"
    )


def context_length(config: PreTrainedConfig) -> int | None:
    """Return the number of positions that the model has; None if the config does not state it."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "n_ctx"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def check_token_ids(ids: torch.Tensor, model: PreTrainedModel) -> None:
    """Raise DataError for token ids that the model does not embed: the tokenizer and the model do not belong together."""
    embedded = model.get_input_embeddings().get_parameter("weight").shape[0]
    if int(ids.min()) < 0:
        raise DataError(f"token ids must be at least 0; got {int(ids.min())}; remove the entries that mark padding")
    if int(ids.max()) >= embedded:
        raise DataError(
            f"the text has token id {int(ids.max())}, but the model embeds only {embedded}; the tokenizer belongs to another "
            "model: use this model's own, which a folder has next to its weights"
        )
