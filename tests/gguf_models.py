"""Tiny models as GGUF files, written by the format's own package as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

from helpers import POSITIONS, tiny_model

ARCHITECTURES = {
    "llama": "llama",
    "tinyllama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma-2": "gemma2",
    "gemma-3": "gemma3",
    "phi-3": "phi3",
    "mixtral": "llama",
    "qwen3-moe": "qwen3moe",
    "qwen2-moe": "qwen2moe",
}
"""Tiny model → the format's name of its architecture, for each architecture that is read block by block."""

CHANGES: dict[str, dict[str, Any]] = {
    "mixtral": {"rms_norm_eps": 1e-6},
    "qwen3": {"head_dim": 128},  # transformers does not read it
    "gemma-3": {"layer_types": None},  # the file does not state them
    "phi-3": {"vocab_size": 32064},  # transformers' padding token is 32000
    "qwen3-moe": {"moe_intermediate_size": 768, "norm_topk_prob": True},  # the file states neither
    "qwen2-moe": {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},  # the same
}


def model_of(name: str) -> Any:
    """The tiny model whose file :func:`write_gguf` writes."""
    return tiny_model(name, **CHANGES.get(name, {}))


def write_gguf(
    path: Path,
    name: str,
    kinds: Sequence[str] = ("Q8_0",),
    *,
    head: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    parts: int = 1,
) -> Path:
    """Write a tiny model as a GGUF file.

    Args:
        path: of the file; with several parts, of the name without their numbers.
        name: of the tiny model.
        kinds: quantisations of the matrices, in turn.
        head: quantisation in which a tied model's embedding is stored again as the head.
        metadata: more keys → strings, numbers or lists of strings.
        parts: number of files.

    Returns:
        The file, or its first part.
    """
    import gguf

    model, architecture = model_of(name), ARCHITECTURES[name]
    tensors = _tensors(model, name, architecture)
    if head is not None:
        tensors["output.weight"] = tensors["token_embd.weight"]
    split = [list(tensors)[start::parts] for start in range(parts)]
    files = (
        [path]
        if parts == 1
        else [path.with_name(f"{path.stem}-{number:05d}-of-{parts:05d}.gguf") for number in range(1, parts + 1)]
    )
    matrices = [key for key, values in tensors.items() if values.ndim > 1]
    kind_of = {key: kinds[turn % len(kinds)] for turn, key in enumerate(matrices)}
    kind_of |= {"output.weight": head} if head else {}
    for number, (file, names) in enumerate(zip(files, split, strict=True)):
        writer = gguf.GGUFWriter(str(file), architecture)
        if number == 0:
            _write_metadata(writer, model.config, architecture, metadata or {})
        if parts > 1:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", parts)
        for key in names:
            kind = gguf.GGMLQuantizationType[kind_of.get(key, "F32")]
            writer.add_tensor(key, gguf.quants.quantize(tensors[key], kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return files[0]


def _tensors(model: Any, name: str, architecture: str) -> dict[str, np.ndarray]:
    """The tensors of a model under the format's names, changed as llama.cpp's converter changes them."""
    import gguf

    number = next(key for key, word in gguf.MODEL_ARCH_NAMES.items() if word == architecture)
    names = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
    state = {key: tensor.detach().float().numpy() for key, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    for key in [key for key in state if key.endswith(".gate_up_proj")]:
        gate, up = np.split(state.pop(key), 2, axis=1)
        stem = key.removesuffix("gate_up_proj")
        state |= {f"{stem}gate_proj.weight": gate, f"{stem}up_proj.weight": up}
    state = {f"{key}.weight" if key.endswith("experts.down_proj") else key: value for key, value in state.items()}
    found = {}
    for key, value in state.items():
        stem, _, suffix = key.rpartition(".")
        stored = f"{names.get_name(stem)}.{suffix}"
        if architecture == "llama" and (".attn_q." in stored or ".attn_k." in stored):
            heads = model.config.num_attention_heads if ".attn_q." in stored else model.config.num_key_value_heads
            value = _permute(value, heads)
        if "ffn_gate_inp_shexp" in stored:
            value = value.squeeze(0)
        if name.startswith("gemma") and stored.endswith("norm.weight"):
            value = value + np.float32(1)
        found[stored] = np.ascontiguousarray(value)
    return found


def _permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of each head from halves to pairs, as the format's rotary embedding wants them."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _write_metadata(writer: Any, config: Any, architecture: str, metadata: Mapping[str, Any]) -> None:
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if architecture == "llama":
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    if (head_dim := getattr(config, "head_dim", None)) is not None:
        writer.add_key_length(head_dim)
    if (window := getattr(config, "sliding_window", None)) is not None:
        writer.add_sliding_window(window)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(_rope_base(config))
    writer.add_vocab_size(config.vocab_size)
    for key, value in metadata.items():
        add = {str: writer.add_string, int: writer.add_uint32, list: writer.add_array}[type(value)]
        add(key, value)
    letters = sorted(ByteLevel.alphabet())
    words = ["<unk>", "<s>", "</s>", *letters, "an", "th"]
    words += [f"<extra{number}>" for number in range(config.vocab_size - len(words))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_merges(["a n", "t h"])  # transformers 5.17 takes a list of one for a string
    if architecture.startswith("gemma"):  # real files have scores, which transformers 5.17 reads
        writer.add_token_scores([-float(rank) for rank in range(config.vocab_size)])
    writer.add_token_types([2, 3, 3, *[1] * (config.vocab_size - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    if architecture == "phi3":  # transformers 5.17 wants it
        writer.add_pad_token_id(32000)


def _rope_base(config: Any) -> float:
    """The base of the rotary embedding; of several, that of global attention."""
    rope = config.rope_parameters
    return float(rope.get("full_attention", rope)["rope_theta"])
