"""A smaller folder computes what the full-size model computes with the same units zeroed or the same blocks skipped.

The oracle (``shrinking``) zeroes columns of transformers' own modules, by names that are written down there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from helpers import ARCHITECTURES, MIXTURES, save_tiny, windows
from shrinking import HEADS, WITH_HEADS, blocks_of, load, zero_heads, zero_neurons
from thanos.shrink.folder import SmallerFolder, write_smaller

WIDTH = {
    "gpt-2": "n_inner",
    "qwen2-moe": "moe_intermediate_size",
    "qwen3-moe": "moe_intermediate_size",
} | dict.fromkeys(("opt-125m", "opt-350m", "opt-6.7b"), "ffn_dim")


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
