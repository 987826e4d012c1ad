"""The parameters of each unit, the smaller config, and what is refused before any work."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from helpers import tiny_config
from shrinking import WITH_HEADS
from thanos.errors import ModelError
from thanos.model.layers import find_blocks
from thanos.model.meta_model import build_meta_model
from thanos.shrink.config import smaller_config
from thanos.shrink.units import GROUP, HEADS, NEURONS, QUERY, units_of


def units(config: Any, kind: str, head_unit: str = GROUP) -> list[Any]:
    model = build_meta_model(config, torch.float32)
    return units_of(model, find_blocks(model)[1], kind, head_unit)


def test_a_group_is_a_key_value_head_with_its_query_heads() -> None:
    (found,) = units(tiny_config("qwen2", **WITH_HEADS), HEADS)[0]
    assert (found.kind, found.writer, len(found)) == (HEADS, "self_attn.o_proj", 4)
    assert found.columns[1].tolist() == list(range(16, 32))
    cut = {one.name: one for one in found.slices}
    assert {name: one.axis for name, one in cut.items()} == {"self_attn.o_proj.weight": 1} | {
        f"self_attn.{matrix}_proj.{part}": 0 for matrix in "qkv" for part in ("weight", "bias")
    }
    assert cut["self_attn.q_proj.bias"].index[1].tolist() == list(range(16, 32))
    assert cut["self_attn.k_proj.bias"].index[1].tolist() == list(range(8, 16))


def test_a_query_head_goes_from_every_group() -> None:
    (found,) = units(tiny_config("phi-3", **WITH_HEADS), HEADS, QUERY)[0]
    second = [head * 8 + entry for head in (1, 3, 5, 7) for entry in range(8)]
    assert [len(found), found.columns[1].tolist()] == [2, second]
    assert {one.name for one in found.slices} == {"self_attn.o_proj.weight", "self_attn.qkv_proj.weight"}
    assert found.slices[1].index[1].tolist() == second


def test_rows_of_fused_matrices() -> None:
    (heads,) = units(tiny_config("phi-3", **WITH_HEADS), HEADS)[0]
    rows = heads.slices[1].index[3].tolist()  # of 64 rows of q, 32 of k, and 32 of v
    assert rows == [*range(48, 64), *range(64 + 24, 64 + 32), *range(96 + 24, 96 + 32)]
    (neurons,) = units(tiny_config("phi-3"), NEURONS)[0]
    assert neurons.slices[1].index[5].tolist() == [5, 64 + 5]


def test_each_expert_has_neurons_of_its_own() -> None:
    found = units(tiny_config("qwen2-moe"), NEURONS)
    assert [one.writer for one in found[1]] == [f"mlp.experts.{expert}.down_proj" for expert in range(4)]
    assert [len(one) for one in found[1]] == [24] * 4
    mixed = units(tiny_config("qwen2-moe", mlp_only_layers=[0]), NEURONS)
    assert [len(block) for block in mixed] == [0, 4]


@pytest.mark.parametrize(
    ("name", "changes", "kind", "message"),
    [
        (
            "GPTJConfig",
            {"n_embd": 32, "n_head": 4, "rotary_dim": 4},
            NEURONS,
            r"GPTJForCausalLM \(model_type gptj\) cannot",
        ),
        ("OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 32}, HEADS, "cannot state a head's width"),
        ("GPT2Config", {}, HEADS, "cannot state a head's width"),
        ("GPTNeoXConfig", {}, HEADS, "cannot state a head's width"),
        ("Olmo2Config", {}, HEADS, "normalises queries and keys over all heads"),
        ("Qwen2MoeConfig", {"num_experts": 4, "mlp_only_layers": [0, 1]}, NEURONS, r"no layer mlp\.experts"),
    ],
)
def test_refused_architectures(name: str, changes: dict[str, Any], kind: str, message: str) -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 40}
    config = getattr(transformers, name)(**sizes | changes)
    with pytest.raises(ModelError, match=message):
        units(config, kind)


def changed(case: str) -> tuple[Any, list[nn.Module]]:
    model: Any = build_meta_model(tiny_config("llama"), torch.float32)
    _, blocks = find_blocks(model)
    if case == "shared":
        blocks[2].mlp = blocks[0].mlp
    elif case == "tied":
        blocks[1].mlp.up_proj.weight = blocks[1].mlp.gate_proj.weight
    elif case == "wide":
        blocks[1].mlp = copy.deepcopy(blocks[1].mlp)
        blocks[1].mlp.down_proj = nn.Linear(48, 32, bias=False, device="meta")
    elif case == "sink":
        blocks[1].self_attn.sinks = nn.Parameter(torch.ones(4, device="meta"))
    return model, blocks


@pytest.mark.parametrize(
    ("case", "kind", "message"),
    [
        ("shared", NEURONS, r"share a parameter \(0\.mlp\.gate_proj\.weight and 2\.mlp\.gate_proj\.weight\)"),
        ("tied", NEURONS, r"share a parameter \(1\.mlp\.gate_proj\.weight and 1\.mlp\.up_proj\.weight\)"),
        ("wide", NEURONS, r"mlp\.down_proj of block 1 has 48 columns, but 64 by the config"),
        ("sink", HEADS, r"block 1: it is not known how self_attn\.sinks depends on the units"),
    ],
)
def test_refused_blocks(case: str, kind: str, message: str) -> None:
    model, blocks = changed(case)
    with pytest.raises(ModelError, match=message):
        units_of(model, blocks, kind)


@pytest.mark.parametrize(
    ("architecture", "changes", "arguments", "message"),
    [
        ("llama", {}, ({NEURONS: 64},), r"64 of 64 neurons in each MLP cannot be removed; 1 to 63 can"),
        ("llama", {}, ({HEADS: 5},), r"5 of 4 heads in each block cannot be removed; 1 to 3 can"),
        ("tinyllama", {}, ({HEADS: 1},), r"1 of 1 key-value heads with 4 query heads each .* the last one must stay"),
        (
            "llama",
            {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 6},
            ({HEADS: 1},),
            r"LlamaConfig refuses .* \(96\) is not a multiple .* \(5\); of 6 units of heads, 2, 3, 4, 5 can be removed",
        ),
        ("mixtral", {}, ({NEURONS: 14},), r"experts of 50 neurons cannot run.*keep a multiple of 8"),
        ("llama", {}, ({}, [3]), r"there is no block 3; the blocks are 0 to 2"),
        ("llama", {}, ({}, [0, 1, 2]), r"3 of 3 blocks cannot be removed; 1 to 2 can"),
        (
            "gpt-2",
            {"scale_attn_by_inverse_layer_idx": True},
            ({}, [1]),
            r"with scale_attn_by_inverse_layer_idx a block's function depends on its index",
        ),
        ("gpt-2", {}, ({HEADS: 1},), r"GPT2Config cannot lose heads"),
    ],
)
def test_refused_sizes(architecture: str, changes: dict[str, Any], arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        smaller_config(tiny_config(architecture, **changes), *arguments)


def test_the_config_says_what_its_class_would_derive() -> None:
    found = smaller_config(tiny_config("qwen2", **WITH_HEADS | {"head_dim": None}), {HEADS: 2, NEURONS: 10})
    sizes = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")
    assert [found[name] for name in sizes] == [54, 4, 2, 8, 64]
    assert smaller_config(tiny_config("gpt-2"), {NEURONS: 28})["n_inner"] == 100
    assert smaller_config(tiny_config("gemma-3"), {}, [0, 3])["layer_types"] == ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(("dropped", "stays"), [([0], False), ([3, 4, 5], True)])
def test_a_period_that_no_longer_describes_the_blocks_is_left_out(dropped: list[int], stays: bool) -> None:
    """Programs that do not know the list of kinds read the period: without it they fail, with a wrong one they run amiss."""
    types = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    changes = {"num_hidden_layers": 6, "layer_types": types, "sliding_window_pattern": 3}
    config = tiny_config("gemma-3", **changes)
    found = smaller_config(config, {}, dropped)
    assert ("sliding_window_pattern" in found, "_sliding_window_pattern" in found) == (stays, stays)
    assert found["layer_types"] == [kind for number, kind in enumerate(types) if number not in dropped]
    assert type(config).from_dict(found).layer_types == found["layer_types"]
    assert "sliding_window_pattern" in smaller_config(config, {NEURONS: 8})
