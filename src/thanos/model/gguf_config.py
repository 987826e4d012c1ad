"""The parts of a model's config that transformers does not read from a GGUF file."""

from __future__ import annotations

from typing import Any

from thanos.checkpoint.gguf_header import GGUFHeader
from thanos.errors import ModelError


def complete_config(config: Any, header: GGUFHeader, parts: int) -> Any:
    """Complete the config of a GGUF file from the header of all its parts.

    transformers has two gaps:

    - Mixtral has the architecture ``llama`` in the format; transformers reads such a file as a LLaMA without experts.
    - transformers assumes tied embeddings if the first part of the file has no head. The head may be in another part.

    Args:
        config: config that transformers read.
        header: header of all parts.
        parts: number of the file's parts.

    Raises:
        ModelError: the file states more blocks than it has tensors.
    """
    blocks = header.metadata.get(f"{header.architecture}.block_count", 0)
    if type(blocks) is int and blocks > len(header.tensors):
        raise ModelError(
            f"the GGUF file states {blocks:,} blocks and holds {len(header.tensors)} tensors: it is corrupt, download it again"
        )
    experts = header.metadata.get("llama.expert_count", 0)
    if config.model_type == "llama" and type(experts) is int and experts > 1:
        from transformers import MixtralConfig

        values = {key: value for key, value in config.to_dict().items() if key != "model_type"}
        used = header.metadata.get("llama.expert_used_count", 2)
        config = MixtralConfig(**values, num_local_experts=experts, num_experts_per_tok=used)
    if parts > 1 and config.tie_word_embeddings:
        config.tie_word_embeddings = "output.weight" not in header.tensors
    return config
