"""Facts about a real model: the layers of SmolLM2-135M on real activations, and the whole way from GGUF to a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import thanos
from thanos import registry
from thanos.calibration.windows import build_calibration
from thanos.model.loading import load_model
from thanos.model.source import resolve_model

pytestmark = pytest.mark.slow

LAYERS = tuple(
    f"model.layers.{block}.{name}"
    for block in (3, 20)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
)


@pytest.fixture(scope="module")
def layers(demo_gguf: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Weight and XᵀX of some layers, the latter in float64 by plain hooks."""
    source = resolve_model(demo_gguf)
    model, tokenizer = load_model(source), source.tokenizer()
    ids = build_calibration(
        "pydoc", tokenizer, samples=8, sequence_length=512, seed=0, end_of_text_id=tokenizer.eos_token_id
    ).ids
    grams: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def see(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1]).double()
            grams[name] = grams.get(name, 0) + rows.T @ rows

        return see

    for name in LAYERS:
        model.get_submodule(name).register_forward_pre_hook(hook(name))
    with torch.inference_mode():
        model(input_ids=ids)
    return {name: (model.get_submodule(name).weight.detach().clone(), grams[name].float()) for name in LAYERS}


def error(weight: torch.Tensor, pruned: torch.Tensor, gram: torch.Tensor) -> float:
    """tr(Δ H Δᵀ) / tr(W H Wᵀ), in float64, from nothing but its definition."""
    weight, gram = weight.double(), gram.double()
    delta = pruned.double() - weight
    return float(((delta @ gram) * delta).sum() / ((weight @ gram) * weight).sum())


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("name", LAYERS)
def test_better_methods_leave_smaller_errors(layers: Any, name: str, pattern: str) -> None:
    weight, gram = layers[name]
    pruned = {m: thanos.prune_weight(weight, gram, method=m, pattern=pattern) for m in registry.method_names()}
    errors = {method: error(weight, result.weight, gram) for method, result in pruned.items()}
    assert errors["thanos"] <= errors["sparsegpt"] <= errors["wanda"] <= errors["magnitude"]
    for method, result in pruned.items():
        assert result.error_after_compensation == pytest.approx(errors[method], rel=1e-3)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8", "columns"])
@pytest.mark.parametrize("method", ["thanos", "sparsegpt"])
@pytest.mark.parametrize("name", LAYERS)
def test_compensation_never_does_harm(layers: Any, name: str, method: str, pattern: str) -> None:
    weight, gram = layers[name]
    result = thanos.prune_weight(weight, gram, method=method, pattern=pattern)
    alone = error(weight, weight * result.kept, gram)
    assert error(weight, result.weight, gram) <= alone
    assert result.error_before_compensation == pytest.approx(alone, rel=1e-3)


def test_from_gguf_to_a_plain_folder(demo_gguf: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe = thanos.Recipe(calibration="pydoc", samples=2, sequence_length=128, pattern="2:4", device="cpu")
    report = thanos.prune(demo_gguf, tmp_path / "out", recipe)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    dense = load_model(resolve_model(demo_gguf), dtype="bfloat16")
    assert config["dtype"] == "bfloat16"
    assert model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    assert torch.equal(model.get_input_embeddings().weight, dense.get_input_embeddings().weight)
    assert torch.equal(model.model.norm.weight, dense.model.norm.weight)
    zeros = 0
    for layer in report.layers:
        weight = model.get_submodule(layer.name).weight
        zeros += int((weight == 0).sum())
        assert int((weight != 0).reshape(-1, 4).sum(1).max()) <= 2, layer.name
    assert zeros == report.totals["zeros_targeted"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    original = resolve_model(demo_gguf).tokenizer()
    text = "def prune(weight):\n    return weight * (weight.abs() > 0.1)  # ∀ ε"
    assert tokenizer(text)["input_ids"] == original(text)["input_ids"]
    assert tokenizer.chat_template == original.chat_template
