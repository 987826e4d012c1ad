"""What is a mixture of experts and what is not: over every causal language model that transformers has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

import thanos
from helpers import tiny_tokenizer
from thanos.errors import ModelError
from thanos.model.experts import Experts, mixtures, unfuse
from thanos.model.layers import find_blocks, linear_layers
from thanos.model.meta_model import build_meta_model

_COMMON = {"vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "hidden_size": 32}
_TEXT = {
    **_COMMON,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 24,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}

TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "RecurrentGemma: gates of a recurrence, one matrix a head": (
        "RecurrentGemmaConfig",
        {**_COMMON, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 1}
        | {"lru_width": 32, "attention_window_size": 16},
    ),
    "RWKV: shares of two tokens": (
        "RwkvConfig",
        {**_COMMON, "attention_hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "context_length": 64},
    ),
    "Gemma 3 with SigLIP: the probe of a pooling": (
        "Gemma3Config",
        {"text_config": _TEXT, "vision_config": _VISION, "mm_tokens_per_image": 4},
    ),
    "XLNet: attention by head": (
        "XLNetConfig",
        {"vocab_size": 320, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
    ),
}


@pytest.mark.parametrize("case", TINY)
def test_parameters_of_three_dimensions_alone_are_no_mixture(case: str) -> None:
    name, values = TINY[case]
    config = getattr(transformers, name)(**values)
    model = AutoModelForCausalLM.from_config(config)
    three = {key for key, parameter in model.named_parameters() if parameter.dim() == 3}
    assert three, "the case is one"
    meta_model = build_meta_model(config, torch.float32)
    assert not any(isinstance(module, Experts) for module in meta_model.modules())
    assert {key for key, _ in meta_model.named_parameters()} == {key for key, _ in model.named_parameters()}
    assert not any(layer.expert or layer.router for layer in linear_layers(meta_model))


@pytest.mark.parametrize("case", [case for case in TINY if not case.startswith(("RWKV", "XLNet"))])
def test_such_models_are_pruned(case: str, text_file: Path, tmp_path: Path) -> None:
    name, values = TINY[case]
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(getattr(transformers, name)(**values))
    dense.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    recipe = thanos.Recipe(method="wanda", calibration=str(text_file), samples=2, sequence_length=16)
    report = thanos.prune(tmp_path / "model", tmp_path / "out", recipe)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    # The oracle: every linear layer of the blocks, and every other parameter as it was.
    prefix, _ = find_blocks(dense)
    targets = {
        f"{key}.weight"
        for key, module in dense.named_modules()
        if isinstance(module, nn.Linear) and key.startswith(f"{prefix}.")
    }
    assert {f"{layer.name}.weight" for layer in report.layers} == targets
    for key, tensor in dense.state_dict().items():
        if key in targets:
            assert int((pruned[key] == 0).sum()) == tensor.numel() // 2, key
        else:
            assert torch.equal(pruned[key], tensor), key


class _Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 8))


def test_a_stack_of_as_many_matrices_as_the_config_has_experts_is_a_mixture() -> None:
    """Code of a checkpoint, under any name: unseen, most of its weights would stay dense in silence."""

    def block(config: Any) -> nn.Module:
        made = nn.Module()
        made.feed_forward, made.router = nn.Module(), _Router()
        made.feed_forward.w1 = nn.Parameter(torch.zeros(4, 16, 8))
        made.config = config
        return made

    model = nn.Module()
    model.layers = nn.ModuleList([block(transformers.PreTrainedConfig(moe_num_experts=4))])
    with pytest.raises(ModelError, match=r"layers\.0\.feed_forward .*w1 \[4, 16, 8\].*not supported"):
        unfuse(model)
    for values in ({}, {"num_experts": 5}, {"num_experts_per_tok": 4}, {"expert_intermediate_size": 4}):
        model = nn.Module()
        model.layers = nn.ModuleList([block(transformers.PreTrainedConfig(**values))])
        unfuse(model)
        assert not isinstance(model.layers[0].feed_forward, Experts)


@pytest.mark.parametrize("name", ["adapters", "mlps", "norms"])
def test_a_list_in_a_block_is_a_mixture_only_if_it_is_one(name: str) -> None:
    """The halves of LongCat's blocks and the adapters of Zamba's stand in lists; no layer beside them is a router."""
    block = nn.Module()
    block.add_module(name, nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]))
    block.gate = nn.Linear(8, 2)
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    assert list(mixtures(model.layers)) == []
    assert not any(layer.router or layer.expert for layer in linear_layers(model))


def _shortened(kind: Any) -> Any:
    """The default config of a class with two layers, one of each kind where there are two."""
    config = kind()
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name in ("num_hidden_layers", "n_layer", "num_layers"):
            if hasattr(part, name):
                setattr(part, name, 2)
        for name in ("layer_types", "block_types", "layers_block_type", "mlp_layer_types"):
            kinds = getattr(part, name, None)
            if isinstance(kinds, list) and len(kinds) > 2:
                setattr(part, name, [*dict.fromkeys(kinds), *kinds][:2])
    return config


def _is_mixture(module: nn.Module) -> bool:
    """By what transformers calls the parameters: the projections of an MLP, stacked; or by the class of such a stack.

    The oldest transformers that is allowed stacks Aria's matrices in ``fc1`` and ``fc2``, which are AriaGroupedExpertsGemm.
    """
    named = {name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3}
    stacks = ("JetMoeParallelExperts", "DbrxExpertGLU", "AriaGroupedExpertsGemm")
    return "down_proj" in named or type(module).__name__ in stacks


_FOREIGN = {"AriaText", "Dbrx", "GptOss", "InklingText", "JetMoe", "Llama4", "Llama4Text", "LongcatFlash"}
"""Mixtures of layouts that are refused: biases, transposed matrices, experts of two kinds."""


@pytest.mark.slow
def test_every_family_of_transformers() -> None:
    """Full-size shapes on the meta device, which take no memory; a family whose default config builds no model is left out."""
    seen, refused, taken = 0, set(), set()
    for kind in list(MODEL_FOR_CAUSAL_LM_MAPPING.keys()):
        if not kind.__module__.startswith("transformers."):  # registered by the code of a checkpoint in another test
            continue
        name = kind.__name__.removesuffix("Config")
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(_shortened(kind))
        except Exception:  # defaults that fit no model: validators of any kind, packages that are absent
            continue
        seen += 1
        before = dict(model.named_modules())
        expected = {path for path, module in before.items() if _is_mixture(module)}
        message = _complaint(model)
        if message:
            refused.add(name)
            named = message.partition("mixture of experts ")[2].partition(" (")[0]  # the mixture, or a part of it
            assert any(f"{named}.".startswith(f"{path}.") for path in expected), f"{name}: {message}"
            continue
        assert {path for path, module in model.named_modules() if isinstance(module, Experts)} == expected, name
        taken |= {name} if expected else set()
        outside = {path: module for path, module in before.items() if not path.startswith(tuple(expected or {"\0"}))}
        assert all(model.get_submodule(path) is module for path, module in outside.items()), name
    assert refused <= _FOREIGN
    assert seen > 100, seen
    assert len(taken) > 20, taken


def _complaint(model: nn.Module) -> str:
    try:
        unfuse(model)
    except ModelError as error:
        return str(error)
    return ""
