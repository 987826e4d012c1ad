"""What transformers leaves out when it reads a model's config from a GGUF file."""

from __future__ import annotations

from typing import Any

from thanos.checkpoint.gguf_header import GGUFHeader


def complete_config(config: Any, header: GGUFHeader, parts: int) -> Any:
    """Return the config of a GGUF file with what transformers does not read.

    - Mixtral has the architecture ``llama`` in the format; transformers reads such a file as a LLaMA without experts.
    - transformers takes a model for tied if the first part of the file has no head. The head may be in another part.

    Args:
        config: as transformers read it.
        header: of all parts.
        parts: number of the file's parts.
    """
    experts = header.metadata.get("llama.expert_count", 0)
    if config.model_type == "llama" and type(experts) is int and experts > 1:
        from transformers import MixtralConfig

        values = {key: value for key, value in config.to_dict().items() if key != "model_type"}
        used = header.metadata.get("llama.expert_used_count", 2)
        config = MixtralConfig(**values, num_local_experts=experts, num_experts_per_tok=used)
    if parts > 1 and config.tie_word_embeddings:
        config.tie_word_embeddings = "output.weight" not in header.tensors
    return config
