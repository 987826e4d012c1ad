"""Warnings about programs that do not run a smaller model correctly, because they do not read all of its config."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from thanos.model.opening import OpenedModel
from thanos.patterns.units import HEADS
from thanos.recipe.units import HEAD_UNITS
from thanos.run.cutting import Cutting
from thanos.shrink.config import lists_out_of_order
from thanos.shrink.units import attention_of

_WIDTH_FROM_HIDDEN_SIZE = ("llama", "qwen2")
"""Types of models whose ``head_dim`` CTranslate2's converter ignores: it takes hidden_size / num_attention_heads."""


def cautions_of(opened: OpenedModel, cutting: Cutting) -> list[str]:
    """Return a sentence for each warning; none until the units to remove are chosen."""
    if cutting.is_open or len(cutting.dropped) < cutting.drops:
        return []
    return list(_cautions(opened.meta_model.config.get_text_config(decoder=True), cutting))


def _cautions(config: Any, cutting: Cutting) -> Iterator[str]:
    heads = cutting.removed.get(HEADS, 0)
    if heads and config.model_type in _WIDTH_FROM_HIDDEN_SIZE:
        what = "gives other tokens without an error" if cutting.head_unit == HEAD_UNITS[1] else "refuses the model"
        yield (
            f"CTranslate2 (4.8.5) takes the width of a head from hidden_size for this architecture, and {what}: use programs "
            "that read head_dim, such as transformers and llama.cpp"
        )
    if lists := lists_out_of_order(config, cutting.dropped):
        names = " and ".join(lists)
        yield (
            f"the remaining blocks have other kinds in {names} than the first blocks of the dense model: a program that "
            f"derives the kind of a block from its number instead of reading {names}, as llama.cpp does for Gemma, "
            "computes other outputs, without an error"
        )
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if (heads or cutting.dropped) and scalar not in (None, attention_of(config).width):
        yield (
            f"query_pre_attn_scalar is {scalar}, which is not the width of a head: llama.cpp takes the scale of Gemma's "
            "attention from the numbers of blocks and heads instead, and computes other outputs, without an error"
        )
