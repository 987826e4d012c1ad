"""Models with units zeroed by the names of transformers' own modules, which know nothing of units."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from helpers import ARCHITECTURES, MIXTURES

BLOCKS = {"gpt-2": "transformer.h", "gpt-neox": "gpt_neox.layers"} | dict.fromkeys(
    ("opt-125m", "opt-350m", "opt-6.7b"), "model.decoder.layers"
)
MLP = {"gpt-2": "mlp.c_proj", "gpt-neox": "mlp.dense_4h_to_h"} | dict.fromkeys(
    ("opt-125m", "opt-350m", "opt-6.7b"), "fc2"
)
NO_HEADS = (*BLOCKS, "olmoe")
HEADS = [one for one in (*ARCHITECTURES, *MIXTURES) if one not in NO_HEADS]
WITH_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64, "head_dim": 8}
"""Sizes of which heads can be removed: 8 query heads in 4 groups, and then 4 heads in 2 groups or in 4."""


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def blocks_of(model: Any, architecture: str) -> tuple[str, nn.ModuleList]:
    prefix = BLOCKS.get(architecture, "model.layers")
    return prefix, model.get_submodule(prefix)


def skip(block: nn.Module) -> None:
    """Let a block hand on its inputs."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *output[1:]) if isinstance(output, tuple) else given

    block.register_forward_hook(hook, with_kwargs=True)


def some(count: int, stay: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:stay].sort().values


def zero_columns(layer: nn.Module, gone: Tensor) -> None:
    weight = layer.get_parameter("weight")
    with torch.no_grad():
        (weight.T if isinstance(layer, nn.Linear) else weight)[gone] = 0


def others(count: int, kept: Tensor) -> Tensor:
    return torch.tensor([one for one in range(count) if one not in set(kept.tolist())])


def zero_neurons(model: Any, architecture: str, stay: int) -> dict[str, Tensor]:
    """Zero random neurons; return the units kept of each writer."""
    prefix, blocks = blocks_of(model, architecture)
    kept = {}
    for number, block in enumerate(blocks):
        if architecture in MIXTURES:
            down = block.mlp.experts.down_proj
            for expert in range(len(down)):
                units = some(down.shape[2], stay, 100 * number + expert)
                kept[f"{prefix}.{number}.mlp.experts.{expert}.down_proj"] = units
                with torch.no_grad():
                    down[expert][:, others(down.shape[2], units)] = 0
        else:
            name = MLP.get(architecture, "mlp.down_proj")
            layer = block.get_submodule(name)
            width = layer.weight.shape[1 if isinstance(layer, nn.Linear) else 0]
            kept[f"{prefix}.{number}.{name}"] = units = some(width, stay, number)
            zero_columns(layer, others(width, units))
    return kept


def zero_heads(model: Any, architecture: str, unit: str, stay: int) -> dict[str, Tensor]:
    """Zero random heads of a model with ``WITH_HEADS``; return the units kept of each writer."""
    prefix, blocks = blocks_of(model, architecture)
    kept = {}
    for number, block in enumerate(blocks):
        units = some(2 if unit == "query" else 4, stay, number)
        kept[f"{prefix}.{number}.self_attn.o_proj"] = units
        for head in range(8):  # heads 0 and 1 are of group 0, 2 and 3 of group 1
            if (head % 2 if unit == "query" else head // 2) not in units.tolist():
                zero_columns(block.self_attn.o_proj, torch.arange(8 * head, 8 * head + 8))
    return kept
