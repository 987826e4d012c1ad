"""A smaller folder computes what the full-size model computes with the same units zeroed or the same blocks skipped.

The oracle zeroes columns of transformers' own modules, by names that are written down here, and knows nothing of units.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from helpers import ARCHITECTURES, MIXTURES, save_tiny, windows
from thanos.shrink.folder import SmallerFolder, write_smaller

BLOCKS = {"gpt-2": "transformer.h", "gpt-neox": "gpt_neox.layers"} | dict.fromkeys(
    ("opt-125m", "opt-350m", "opt-6.7b"), "model.decoder.layers"
)
MLP = {"gpt-2": "mlp.c_proj", "gpt-neox": "mlp.dense_4h_to_h"} | dict.fromkeys(
    ("opt-125m", "opt-350m", "opt-6.7b"), "fc2"
)
WIDTH = {
    "gpt-2": "n_inner",
    "qwen2-moe": "moe_intermediate_size",
    "qwen3-moe": "moe_intermediate_size",
} | dict.fromkeys(("opt-125m", "opt-350m", "opt-6.7b"), "ffn_dim")
NO_HEADS = (*BLOCKS, "olmoe")
HEADS = [one for one in (*ARCHITECTURES, *MIXTURES) if one not in NO_HEADS]
WITH_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64, "head_dim": 8}
"""Sizes of which heads can be removed: 8 query heads in 4 groups, and then 4 heads in 2 groups or in 4."""


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def blocks_of(model: Any, architecture: str) -> tuple[str, nn.ModuleList]:
    prefix = BLOCKS.get(architecture, "model.layers")
    return prefix, model.get_submodule(prefix)


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


def assert_equal_logits(smaller: Path, zeroed: Any) -> None:
    ids = windows(2, 40, seed=5)
    with torch.inference_mode():
        found, expected = (model(input_ids=ids).logits for model in (load(smaller), zeroed))
    assert expected.abs().max() > 0.05
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def shrink(model: Any, folder: Path, kept: dict[str, Tensor], **how: Any) -> SmallerFolder:
    """Save the zeroed model with the folder's other files, and write the smaller one beside it."""
    model.save_pretrained(folder)
    found = write_smaller(folder, folder.parent / "smaller", kept, **how)
    assert sorted(path.name for path in folder.parent.iterdir()) == sorted({folder.name, "smaller"})
    tensors = load_file(folder.parent / "smaller/model.safetensors")
    assert found.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert found.nbytes == (folder.parent / "smaller/model.safetensors").stat().st_size
    assert found.dense_parameters == sum(one.numel() for one in load_file(folder / "model.safetensors").values())
    return found


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MIXTURES])
def test_without_neurons(architecture: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "full", architecture)
    model = load(folder)
    stay = 16 if architecture in MIXTURES else 17
    kept = zero_neurons(model, architecture, stay)
    found = shrink(model, folder, kept)
    assert_equal_logits(tmp_path / "smaller", model)
    smaller = load(tmp_path / "smaller")
    field = WIDTH.get(architecture, "intermediate_size")
    assert getattr(smaller.config, field) == stay
    lost = sum(parameter.numel() for parameter in model.parameters()) - sum(
        parameter.numel() for parameter in smaller.parameters()
    )
    assert lost == found.dense_parameters - found.parameters
    assert json.loads((tmp_path / "smaller/config.json").read_text())[field] == stay
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "smaller" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("architecture", HEADS)
@pytest.mark.parametrize("unit", ["group", "query"])
def test_without_heads(architecture: str, unit: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "full", architecture, **WITH_HEADS)
    model = load(folder)
    shrink(model, folder, zero_heads(model, architecture, unit, 1 if unit == "query" else 2), head_unit=unit)
    assert_equal_logits(tmp_path / "smaller", model)
    config = load(tmp_path / "smaller").config
    sizes = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    assert sizes == ((4, 4, 8) if unit == "query" else (4, 2, 8))


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MIXTURES])
def test_without_blocks(architecture: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "full", architecture)
    model = load(folder)
    shrink(model, folder, {}, dropped_blocks=[1])
    _, blocks = blocks_of(model, architecture)
    smaller = load(tmp_path / "smaller")
    assert len(blocks_of(smaller, architecture)[1]) == len(blocks) - 1

    def skip(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *output[1:]) if isinstance(output, tuple) else given

    blocks[1].register_forward_hook(skip, with_kwargs=True)
    assert_equal_logits(tmp_path / "smaller", model)
