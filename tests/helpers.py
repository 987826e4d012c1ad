"""Tiny models and texts that tests build, so that they download nothing."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
"""Root folder of the repository."""


def benchmark_script(name: str) -> ModuleType:
    """Return a script of benchmarks/ as a module. Meanwhile their folder is on the path, for the scripts that it imports."""
    folder = str(ROOT / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return import_module(name)
    finally:
        sys.path.remove(folder)


VOCABULARY = 320
POSITIONS = 256

_COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA_LIKE = {
    **_COMMON,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.15,
}
_OPT = {
    **_COMMON,
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "word_embed_proj_dim": 32,
    "init_std": 0.15,
}
_GPT = {**_COMMON, "initializer_range": 0.15}

_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt-125m": ("OPTConfig", _OPT),
    "opt-350m": ("OPTConfig", {**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "opt-6.7b": ("OPTConfig", {**_OPT, "hidden_size": 48, "ffn_dim": 192, "word_embed_proj_dim": 48}),
    "llama": ("LlamaConfig", {**_LLAMA_LIKE, "tie_word_embeddings": False}),
    "llama-3": (
        "LlamaConfig",
        {
            **_LLAMA_LIKE,
            "num_key_value_heads": 2,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "tinyllama": ("LlamaConfig", {**_LLAMA_LIKE, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**_LLAMA_LIKE, "num_key_value_heads": 2, "sliding_window": 24}),
    "qwen2": ("Qwen2Config", {**_LLAMA_LIKE, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", {**_LLAMA_LIKE, "num_key_value_heads": 2, "head_dim": 8}),
    "gemma-2": (
        "Gemma2Config",
        {**_LLAMA_LIKE, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 24, "num_hidden_layers": 4},
    ),
    "gemma-3": (
        "Gemma3TextConfig",
        {
            **_LLAMA_LIKE,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 24,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "phi-3": ("Phi3Config", {**_LLAMA_LIKE, "num_key_value_heads": 2}),
    "gpt-neox": (
        "GPTNeoXConfig",
        {
            **_GPT,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": POSITIONS,
        },
    ),
    "gpt-2": ("GPT2Config", {**_GPT, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": POSITIONS}),
}

_OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("BloomConfig", {**_GPT, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "openai-gpt": ("OpenAIGPTConfig", {**_GPT, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": POSITIONS}),
    "xglm": (
        "XGLMConfig",
        {
            **_COMMON,
            "d_model": 32,
            "ffn_dim": 64,
            "num_layers": 3,
            "attention_heads": 4,
            "max_position_embeddings": POSITIONS,
            "init_std": 0.15,
        },
    ),
    "phi": (
        "PhiConfig",
        {
            **_COMMON,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": POSITIONS,
            "initializer_range": 0.15,
        },
    ),
    "falcon": (
        "FalconConfig",
        {**_GPT, "hidden_size": 32, "ffn_hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4},
    ),
    "cohere": ("CohereConfig", {**_LLAMA_LIKE, "num_key_value_heads": 2}),
    "gemma-4": (
        "Gemma4TextConfig",
        {
            **_COMMON,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "global_head_dim": 8,
            "max_position_embeddings": POSITIONS,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 2,
        },
    ),
    "rwkv": (
        "RwkvConfig",
        {
            **_COMMON,
            "hidden_size": 32,
            "attention_hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "context_length": POSITIONS,
            "rescale_every": 2,
        },
    ),
}
"""Architectures that the project does not promise. Their blocks take arguments of other shapes, or return lists.

RWKV computes differently in evaluation than in training.
"""

ARCHITECTURES = tuple(_CONFIGS)
"""Every dense architecture that the project promises to prune."""

_MIXTURE = {**_LLAMA_LIKE, "num_hidden_layers": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2}

_MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {**_MIXTURE, "num_local_experts": 4}),
    "qwen3-moe": ("Qwen3MoeConfig", {**_MIXTURE, "num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8}),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {**_MIXTURE, "num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    ),
    "olmoe": ("OlmoeConfig", {**_MIXTURE, "num_experts": 8}),
}

MIXTURES = tuple(_MIXTURES)
"""Mixtures of experts that the project promises to prune."""

WORDS = tuple(f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in ("n", "r", "st", "t", "x", "l", "m", "p"))


def tiny_config(architecture: str = "llama", **changes: Any) -> Any:
    """The config of a model with three or four small blocks."""
    import transformers

    name, values = (_CONFIGS | _MIXTURES | _OTHERS)[architecture]
    return getattr(transformers, name)(**{**values, **changes})


def tiny_model(
    architecture: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> Any:
    """A model with random weights, the same for the same seed."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(architecture, **changes))
        for name, parameter in model.named_parameters():
            if architecture in _MIXTURES and not parameter.any():  # routers that send every token to the same experts
                torch.nn.init.normal_(parameter, std=0.15)
            if name.endswith("bias"):  # zeros at first, which would hide a bias that was lost
                torch.nn.init.normal_(parameter, std=0.05)
    return model.to(dtype).eval()


@cache
def tiny_tokenizer(*, begins: bool = True) -> Any:
    """A tokenizer with one token for each word of :data:`WORDS`. With ``begins`` every text begins with ``<s>``."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {word: 4 + i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    fast.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return fast


def save_tiny(
    folder: Path,
    architecture: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    begins: bool = True,
    **arguments: Any,
) -> Path:
    """Save a tiny model, its tokenizer and its generation config as a Hugging Face folder; return the folder."""
    save_arguments = {k: arguments.pop(k) for k in ("max_shard_size", "save_original_format") if k in arguments}
    model = tiny_model(architecture, dtype=dtype, **arguments)
    model.save_pretrained(folder, **save_arguments)
    tiny_tokenizer(begins=begins).save_pretrained(folder)
    return folder


def small_gguf(path: Path) -> Path:
    """A LLaMA with one block as a GGUF file, written by the format's own package."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(40)
    draw = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (40, 32),
        "output.weight": (40, 32),
        "output_norm.weight": (32,),
        "blk.0.attn_norm.weight": (32,),
        "blk.0.ffn_norm.weight": (32,),
        "blk.0.attn_q.weight": (32, 32),
        "blk.0.attn_k.weight": (32, 32),
        "blk.0.attn_v.weight": (32, 32),
        "blk.0.attn_output.weight": (32, 32),
        "blk.0.ffn_gate.weight": (64, 32),
        "blk.0.ffn_up.weight": (64, 32),
        "blk.0.ffn_down.weight": (32, 64),
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, draw.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def prose(words: int, *, seed: int = 0) -> str:
    """A text of ``words`` words in sentences. Word frequencies differ, so that a model can learn something."""
    draw = random.Random(seed)
    weights = [1 / (rank + 1) for rank in range(len(WORDS))]
    return " ".join(draw.choices(WORDS, weights, k=words))


def packed_windows(tokenizer: Any, text: str, samples: int, length: int) -> torch.Tensor:
    """Independent version of packed calibration windows of one document, (samples, length).

    The document's tokens are in order. Each window begins as the tokenizer begins a text.
    """
    ids, whole = (tokenizer(text, add_special_tokens=special)["input_ids"] for special in (False, True))
    begin = whole[: len(whole) - len(ids)]
    taken = length - len(begin)
    return torch.tensor([[*begin, *ids[taken * i : taken * (i + 1)]] for i in range(samples)])


def windows(samples: int, length: int, *, seed: int = 0) -> torch.Tensor:
    """Random token ids, (samples, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, 4 + len(WORDS), (samples, length), generator=generator)


def stopped_at(block: int) -> Callable[[Any], None]:
    """Return a watcher that interrupts a run when a block is finished."""

    def stop(event: Any) -> None:
        if event.kind == "block" and event.block == block:
            raise KeyboardInterrupt

    return stop
