"""Finding blocks and linear layers by structure, choosing among them, and building a model without its weights."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from helpers import ARCHITECTURES, MIXTURES, tiny_config, tiny_model
from thanos.errors import ModelError, UserError
from thanos.model.layers import LinearLayer, find_blocks, linear_layers, select_layers
from thanos.model.meta_model import build_meta_model
from thanos.recipe import Override, Recipe

# Written from the architectures' papers and published checkpoints, not from what the code returns.
_LLAMA = ("model.layers", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
_OPT = ("model.decoder.layers", {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"})
_EXPECTED: dict[str, tuple[str, set[str]]] = {
    **dict.fromkeys(("llama", "llama-3", "tinyllama", "mistral", "qwen2", "qwen3", "gemma-2", "gemma-3"), _LLAMA),
    **dict.fromkeys(("opt-125m", "opt-350m", "opt-6.7b"), _OPT),
    "phi-3": ("model.layers", {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
    "gpt-neox": ("gpt_neox.layers", {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
    "gpt-2": ("transformer.h", {"c_attn", "c_proj", "c_fc"}),
}
_OUTSIDE = {"opt-350m": {"model.decoder.project_in", "model.decoder.project_out", "lm_head"}}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_and_layers_of_every_architecture(architecture: str) -> None:
    model = tiny_model(architecture)
    expected_name, expected_kinds = _EXPECTED[architecture]
    name, blocks = find_blocks(model)
    assert name == expected_name
    assert len(blocks) == model.config.num_hidden_layers
    assert [id(block) for block in blocks] == [id(block) for block in model.get_submodule(name)]

    layers = linear_layers(model)
    for index in range(len(blocks)):
        assert {layer.name.rsplit(".", 1)[-1] for layer in layers if layer.block == index} == expected_kinds
    assert {layer.name for layer in layers if layer.block is None} == _OUTSIDE.get(architecture, {"lm_head"})
    assert len({layer.name for layer in layers}) == len(layers)
    for layer in layers:
        assert layer.module is model.get_submodule(layer.name)
        assert model.get_parameter(layer.weight_name) is layer.module.weight
        assert layer.transposed is (architecture == "gpt-2" and layer.name != "lm_head")


@pytest.mark.parametrize("architecture", ["llama", "gpt-2"])
def test_shape_is_outputs_by_inputs_whatever_the_storage(architecture: str) -> None:
    for layer in linear_layers(tiny_model(architecture)):
        rows, columns = layer.shape
        probe = torch.randn(5, columns)
        assert layer.module(probe).shape == (5, rows)
        weight = layer.oriented(layer.module.weight)
        bias = getattr(layer.module, "bias", None)
        expected = probe @ weight.T + (0 if bias is None else bias)
        torch.testing.assert_close(layer.module(probe), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(layer.oriented(weight), layer.module.weight)


def test_the_list_with_most_linear_weights_wins() -> None:
    model = nn.Module()
    model.small = nn.ModuleList([nn.Linear(4, 4)] * 6)
    model.blocks = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
    model.none = nn.ModuleList([nn.LayerNorm(512)])
    assert find_blocks(model)[0] == "blocks"


def test_a_model_without_a_list_of_blocks_is_refused() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norms = nn.Linear(4, 4), nn.ModuleList([nn.LayerNorm(4)])

    with pytest.raises(ModelError, match=r"Flat has no list of decoder blocks with linear layers.*not supported"):
        find_blocks(Flat())


# --- mixtures of experts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", MIXTURES)
def test_every_matrix_of_every_expert_is_a_linear_layer(architecture: str) -> None:
    config = tiny_config(architecture)
    meta_model = build_meta_model(config, torch.float32)
    count = getattr(config, "num_local_experts", None) or config.num_experts
    inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    for block in range(config.num_hidden_layers):
        found = {layer.name: layer for layer in linear_layers(meta_model) if layer.block == block and layer.expert}
        prefix = f"model.layers.{block}.mlp.experts"
        shapes = {"gate_proj": (inner, 32), "up_proj": (inner, 32), "down_proj": (32, inner)}
        assert {name: layer.shape for name, layer in found.items()} == {
            f"{prefix}.{index}.{kind}": shape for index in range(count) for kind, shape in shapes.items()
        }
        assert {layer.expert for layer in found.values()} == {f"{prefix}.{index}" for index in range(count)}
    assert all(parameter.device.type == "meta" for parameter in meta_model.parameters())


def test_the_gate_of_a_shared_expert_routes_and_is_never_pruned() -> None:
    layers = linear_layers(build_meta_model(tiny_config("qwen2-moe"), torch.float32))
    routers = {layer.name for layer in layers if layer.router}
    assert routers == {f"model.layers.{block}.mlp.shared_expert_gate" for block in range(2)}
    chosen, dense = select_layers(layers, Recipe(targets=("*",)))
    assert not routers & names(chosen)
    assert {dense[name] for name in routers} == {"routes tokens to experts"}
    assert "model.layers.0.mlp.shared_expert.gate_proj" in names(chosen)
    with pytest.raises(ModelError, match="leaves no layer to prune"):
        select_layers(layers, Recipe(targets=("shared_expert_gate",)))


@pytest.mark.parametrize("nested", [False, True])
def test_experts_in_a_list_of_modules_have_a_linear_router_beside_them(nested: bool) -> None:
    # As models with code of their own hold them: a list of small networks, and a plain linear layer that scores them.
    def expert() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 8))

    def block() -> nn.Module:
        block = nn.Module()
        block.attention = nn.Linear(8, 3)  # as many outputs as there are experts, but not beside them
        block.mlp = nn.Module()
        block.mlp.experts = nn.ModuleList(expert() for _ in range(3))
        block.mlp.gate = nn.Sequential(nn.Linear(8, 3)) if nested else nn.Linear(8, 3)
        block.mlp.shared = nn.Linear(8, 8)
        return block

    model = nn.Module()
    model.layers = nn.ModuleList([block(), block()])
    layers = {layer.name: layer for layer in linear_layers(model)}
    assert len(layers) == 2 * (1 + 6 + 1 + 1)
    gate = "mlp.gate.0" if nested else "mlp.gate"
    assert {name for name, layer in layers.items() if layer.router} == {f"layers.{i}.{gate}" for i in range(2)}
    assert layers["layers.1.mlp.experts.2.0"].expert == "layers.1.mlp.experts.2"
    assert not layers["layers.1.mlp.shared"].expert


# --- which layers are pruned --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layers() -> list[LinearLayer]:
    return linear_layers(tiny_model("llama"))


def names(chosen: list[LinearLayer]) -> set[str]:
    return {layer.name for layer in chosen}


def test_by_default_every_layer_of_the_blocks_and_nothing_else(layers: list[LinearLayer]) -> None:
    chosen, dense = select_layers(layers, Recipe())
    assert len(chosen) == 3 * 7
    assert dense == {"lm_head": "outside the decoder blocks"}


def test_targets_choose_and_reach_outside_the_blocks(layers: list[LinearLayer]) -> None:
    chosen, dense = select_layers(layers, Recipe(targets=("q_proj", "lm_head", "model.layers.2.mlp.*")))
    assert names(chosen) == {
        *(f"model.layers.{i}.self_attn.q_proj" for i in range(3)),
        *(f"model.layers.2.mlp.{kind}_proj" for kind in ("gate", "up", "down")),
        "lm_head",
    }
    assert set(dense.values()) == {"not matched by targets"}
    assert names(chosen) | set(dense) == names(layers)


def test_skip_wins_over_targets(layers: list[LinearLayer]) -> None:
    chosen, dense = select_layers(layers, Recipe(targets=("*_proj",), skip=("down_proj", "layers.1.*")))
    assert names(chosen) == {
        layer.name for layer in layers if layer.block in (0, 2) and not layer.name.endswith("down_proj")
    }
    assert dense["model.layers.0.mlp.down_proj"] == "matched by skip"
    assert dense["model.layers.1.self_attn.q_proj"] == "matched by skip"
    assert dense["lm_head"] == "not matched by targets"


def test_a_glob_matches_whole_names_from_a_dot_on(layers: list[LinearLayer]) -> None:
    with pytest.raises(ModelError, match="matches no linear layer"):
        select_layers(layers, Recipe(targets=("proj",)))  # not the end of q_proj
    chosen, _ = select_layers(layers, Recipe(targets=("self_attn.q_proj",)))
    assert len(chosen) == 3


def test_an_override_can_leave_layers_dense_and_a_later_one_bring_them_back(layers: list[LinearLayer]) -> None:
    recipe = Recipe(
        overrides=(
            Override(match="model.layers.0.*", skip=True),
            Override(match="model.layers.0.mlp.*", settings={"method": "wanda"}),
        )
    )
    chosen, dense = select_layers(layers, recipe)
    assert {name for name in names(chosen) if ".0." in name} == {
        f"model.layers.0.mlp.{kind}_proj" for kind in ("gate", "up", "down")
    }
    assert dense["model.layers.0.self_attn.q_proj"] == "skipped by an override"


@pytest.mark.parametrize("option", ["targets", "skip"])
def test_a_glob_that_matches_nothing_is_named_with_what_there_is(layers: list[LinearLayer], option: str) -> None:
    with pytest.raises(ModelError) as caught:
        select_layers(layers, Recipe(**{option: ("q_proj", "*.query")}))
    message = str(caught.value)
    assert f"--{option} '*.query' matches no linear layer" in message
    assert all(kind in message for kind in ("q_proj", "down_proj", "lm_head"))
    assert "\n" not in message


def test_an_override_that_matches_nothing_is_named_too(layers: list[LinearLayer]) -> None:
    overrides = (Override(match="q_proj"), Override(match="*.mlp.dwon_proj", settings={"method": "wanda"}))
    with pytest.raises(ModelError, match=r"the override of '\*\.mlp\.dwon_proj' matches no linear layer"):
        select_layers(layers, Recipe(overrides=overrides))


@pytest.mark.parametrize("recipe", [Recipe(skip=("*",)), Recipe(overrides=(Override(match="*", skip=True),))])
def test_nothing_left_to_prune_is_an_error(layers: list[LinearLayer], recipe: Recipe) -> None:
    with pytest.raises(UserError, match=r"leaves no layer to prune.*loosen targets, skip or the overrides"):
        select_layers(layers, recipe)


# --- the meta model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_meta_model_has_no_weights_and_every_buffer(architecture: str) -> None:
    meta_model = build_meta_model(tiny_config(architecture), torch.float32)
    model = tiny_model(architecture)
    parameters, expected = dict(meta_model.named_parameters()), dict(model.named_parameters())
    assert parameters.keys() == expected.keys()
    for name, parameter in parameters.items():
        assert parameter.device.type == "meta", name
        assert parameter.shape == expected[name].shape
        assert parameter.dtype == torch.float32
        assert not parameter.requires_grad
    buffers, real = dict(meta_model.named_buffers()), dict(model.named_buffers())
    assert buffers.keys() == real.keys()
    for name, buffer in buffers.items():
        assert buffer.device.type == "cpu", name
        assert buffer.dtype == real[name].dtype, name
        assert torch.equal(buffer, real[name]), name
    assert not meta_model.training
    tied = meta_model.get_input_embeddings().weight is meta_model.get_output_embeddings().weight
    assert tied is (model.get_input_embeddings().weight is model.get_output_embeddings().weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama-3", "gemma-2", "gemma-3", "gpt-neox"])
def test_a_16_bit_meta_model_keeps_the_buffers_of_a_loaded_model(
    architecture: str, dtype: torch.dtype, tmp_path
) -> None:
    # Rotary frequencies rounded to 16 bits would shift positions; the oracle is what from_pretrained gives.
    tiny_model(architecture, dtype=dtype).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    meta_model = build_meta_model(tiny_config(architecture), dtype)
    assert {p.dtype for p in meta_model.parameters()} == {dtype}
    real = dict(loaded.named_buffers())
    for name, buffer in meta_model.named_buffers():
        assert buffer.dtype == real[name].dtype, name
        assert torch.equal(buffer, real[name]), name


def test_building_a_meta_model_leaves_torch_as_it_was() -> None:
    register = nn.Module.register_parameter
    build_meta_model(tiny_config("llama"), torch.bfloat16)
    assert nn.Module.register_parameter is register
    assert torch.get_default_dtype() == torch.float32
    says = r"cannot build the model from its config \(KeyError: 'no-such-activation'"
    with pytest.raises(ModelError, match=says):  # in the middle of building the first block
        build_meta_model(tiny_config("llama", hidden_act="no-such-activation"), torch.float32)
    assert nn.Module.register_parameter is register
    assert nn.Linear(2, 2).weight.device.type == "cpu"
