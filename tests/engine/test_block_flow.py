"""The order of the data inside a block, and its layers that write into the residual stream, found without names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import ARCHITECTURES, MIXTURES, tiny_config, tiny_model, windows
from thanos.engine.block_calls import BlockCalls
from thanos.engine.block_flow import BLOCK_INPUT, Stream, levels, residual_streams
from thanos.model.layers import LinearLayer, find_blocks, linear_layers
from thanos.model.meta_model import build_meta_model

LLAMA = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
OPT = (("q_proj", "k_proj", "v_proj"), ("out_proj",), ("fc1",), ("fc2",))
STEPS = {
    "opt-125m": OPT,
    "opt-350m": OPT,
    "opt-6.7b": OPT,
    "phi-3": (("qkv_proj",), ("o_proj",), ("gate_up_proj",), ("down_proj",)),
    "gpt-neox": (("query_key_value", "dense_h_to_4h"), ("dense", "dense_4h_to_h")),  # attention and MLP side by side
    "gpt-2": (("c_attn",), ("c_proj",), ("c_fc",), ("c_proj",)),
}
NORM = "post_attention_layernorm"
STREAMS = {
    "opt-125m": {"out_proj": BLOCK_INPUT, "fc2": "final_layer_norm"},
    "opt-350m": {"out_proj": BLOCK_INPUT, "fc2": "fc1"},
    "opt-6.7b": {"out_proj": BLOCK_INPUT, "fc2": "final_layer_norm"},
    "gpt-2": {"attn.c_proj": BLOCK_INPUT, "mlp.c_proj": "ln_2"},
    # Attention and MLP side by side: both outputs are added to the block's input.
    "gpt-neox": {
        "dense": Stream(BLOCK_INPUT, "mlp.dense_4h_to_h"),
        "dense_4h_to_h": Stream(BLOCK_INPUT, "attention.dense"),
    },
    "phi": {"dense": Stream(BLOCK_INPUT, "mlp.fc2"), "fc2": Stream(BLOCK_INPUT, "self_attn.dense")},
    "falcon": {
        "dense": Stream(BLOCK_INPUT, "mlp.dense_4h_to_h"),
        "dense_4h_to_h": Stream(BLOCK_INPUT, "self_attention.dense"),
    },
    "cohere": {
        "o_proj": Stream(BLOCK_INPUT, "mlp.down_proj"),
        "down_proj": Stream(BLOCK_INPUT, "self_attn.o_proj"),
    },
    "gemma-2": {},  # what is added is normalised first
    "gemma-3": {},
}


def block_of(architecture: str, tokens: int = 24) -> tuple[Callable[[], Tensor], Tensor, nn.Module, list[LinearLayer]]:
    """A function that runs block 1 on one sequence, its input, the block, and its layers but for routers."""
    model = build_meta_model(tiny_config(architecture), torch.float32)
    real = tiny_model(architecture)
    for name, parameter in list(model.named_parameters()):
        owner = model.get_submodule(name.rpartition(".")[0])
        with torch.random.fork_rng():
            torch.manual_seed(len(name))
            known = dict(real.named_parameters()).get(name)
            value = torch.randn(parameter.shape) * 0.2 if known is None else known.detach()
        owner._parameters[name.rpartition(".")[2]] = nn.Parameter(value, requires_grad=False)
    _, blocks = find_blocks(model)
    calls = BlockCalls(blocks)
    with torch.no_grad():
        hidden = calls.record(model, windows(1, tokens))
    layers = [layer for layer in linear_layers(model) if layer.block == 1 and not layer.router]
    return lambda: calls.run(1, hidden, 0), hidden, blocks[1], layers


def ends(names: Any, parts: int = 1) -> set[str]:
    return {".".join(name.split(".")[-parts:]) for name in names}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_are_ordered_by_what_their_inputs_depend_on(architecture: str) -> None:
    run, _, _, layers = block_of(architecture)
    with torch.no_grad():
        found = levels(run, layers)
    steps = STEPS.get(architecture, LLAMA)
    assert [ends(name for name, level in found.items() if level == number) for number in range(len(steps))] == [
        set(step) for step in steps
    ]
    assert not any(layer.module._forward_hooks or layer.module._forward_pre_hooks for layer in layers)


@pytest.mark.parametrize("architecture", MIXTURES)
@pytest.mark.parametrize("tokens", [24, 1])
def test_all_experts_are_pruned_together_even_those_that_no_token_reaches(architecture: str, tokens: int) -> None:
    run, _, _, layers = block_of(architecture, tokens)
    experts = [layer for layer in layers if layer.expert]
    reached: set[str] = set()
    handles = [
        layer.module.register_forward_pre_hook(lambda *_, layer=layer: reached.add(layer.name)) for layer in experts
    ]
    found = levels(run, layers)
    for handle in handles:
        handle.remove()
    assert (len(reached) < len(experts)) == (tokens == 1)
    assert {found[layer.name] for layer in experts if not layer.name.endswith("down_proj")} == {2}
    assert {found[layer.name] for layer in experts if layer.name.endswith("down_proj")} == {3}


def test_layers_that_are_left_dense_pass_on_what_others_depend_on() -> None:
    run, _, _, layers = block_of("llama")
    found = levels(run, [layer for layer in layers if layer.name.endswith(("q_proj", "down_proj"))])
    assert {name.split(".")[-1]: level for name, level in found.items()} == {"q_proj": 0, "down_proj": 1}


def test_a_block_that_autograd_cannot_follow_is_ordered_by_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    run, _, _, layers = block_of("llama")

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("derivative for some_kernel is not implemented")

    monkeypatch.setattr(torch.autograd, "grad", fails)
    found = levels(run, layers)
    assert [ends(name for name, level in found.items() if level == number) for number in range(4)] == list(
        map(set, LLAMA)
    )


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "phi", "falcon", "cohere"])
def test_layers_that_write_into_the_residual_stream_are_found(architecture: str) -> None:
    run, hidden, block, layers = block_of(architecture)
    found = residual_streams(run, hidden, block, layers)
    expected = STREAMS.get(architecture, {"o_proj": BLOCK_INPUT, "down_proj": NORM})
    parts = 2 if architecture == "gpt-2" else 1
    assert {
        ".".join(name.split(".")[-parts:]): Stream(stream.source, ".".join(stream.parallel.split(".")[-2:]))
        for name, stream in found.items()
    } == {name: one if isinstance(one, Stream) else Stream(one) for name, one in expected.items()}


@pytest.mark.parametrize("architecture", MIXTURES)
def test_what_is_summed_over_experts_is_not_taken_for_one_layer(architecture: str) -> None:
    run, hidden, block, layers = block_of(architecture)
    found = residual_streams(run, hidden, block, layers)
    assert {name.split(".")[-1]: stream for name, stream in found.items()} == {"o_proj": Stream(BLOCK_INPUT)}


def test_a_layer_without_output_is_no_writer() -> None:
    run, hidden, block, layers = block_of("llama")
    for layer in layers:
        layer.module.get_parameter("weight").zero_()
    assert residual_streams(run, hidden, block, layers) == {}
