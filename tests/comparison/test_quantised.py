"""Quantised versions of a model: what torchao made of it, against the rounding that it promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from helpers import tiny_model
from thanos.bench.weights import parts, weight_bytes
from thanos.comparison.measure import saved_bytes
from thanos.comparison.quantised import KINDS, check_device, check_installed, quantise
from thanos.errors import DataError, ModelError

IDS = torch.arange(12)[None]


def test_a_missing_torchao_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thanos.comparison.quantised.is_installed", lambda name: False)
    with pytest.raises(DataError, match="torchao"):
        check_installed()


def test_what_a_device_does_not_have_is_said_before_a_model_is_loaded() -> None:
    for kind, device, dtype in (
        ("int4", "cuda", torch.bfloat16),
        ("int4", "cpu", torch.float32),
        ("int8", "cuda", torch.float32),
        ("int8", "mps", torch.float16),
    ):
        check_device(kind, torch.device(device), dtype)
    with pytest.raises(ModelError, match="the model runs in float32; give --dtype bfloat16"):
        check_device("int4", torch.device("cuda"), torch.float32)
    with pytest.raises(ModelError, match="no int4 for mps"):
        check_device("int4", torch.device("mps"), torch.bfloat16)


def test_weights_are_within_half_a_step_and_int4_is_smaller() -> None:
    pytest.importorskip("torchao", reason="the extra quantised is not installed")
    sizes = {}
    for kind in KINDS:
        plain, model = (tiny_model("llama", hidden_size=64, dtype=torch.float32).eval() for _ in range(2))
        model.load_state_dict(plain.state_dict())
        words = quantise(model, kind)
        assert "torchao" in words
        layer: Any = model.get_submodule("model.layers.0.mlp.up_proj")
        dense: Any = plain.get_submodule("model.layers.0.mlp.up_proj")
        assert len(parts(layer.weight)) > 1
        with torch.no_grad():
            shown = layer(torch.eye(layer.in_features))
        error = (shown - dense.weight.T).abs()
        if kind == "int8":  # symmetric, one scale a row of 255 steps
            step = dense.weight.abs().amax(1) / 127
            assert bool((error <= 0.51 * step).all())
        else:
            assert float(error.norm() / dense.weight.norm()) < 0.2
        with torch.inference_mode():
            assert bool(torch.isfinite(model(input_ids=IDS).logits).all())
        sizes[kind] = weight_bytes(model)[0]
        assert sizes[kind] < 0.6 * weight_bytes(plain)[0]
        assert saved_bytes(model) > sizes[kind] - sum(buffer.nbytes for buffer in model.buffers())
    assert sizes["int4"] < sizes["int8"]


def test_a_tied_head_stays_dense() -> None:
    pytest.importorskip("torchao", reason="the extra quantised is not installed")
    model = tiny_model("llama", hidden_size=64, dtype=torch.float32, tie_word_embeddings=True).eval()
    words = quantise(model, "int8")
    head: Any = model.get_output_embeddings()
    assert "tied" in words
    assert head.weight is model.get_input_embeddings().weight
    assert type(head.weight) is nn.Parameter
    embedding = head.weight.nbytes
    assert weight_bytes(model)[0] > embedding
    assert weight_bytes(model)[1] == weight_bytes(model)[0]  # the head reads the embedding


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_runs_on_cuda(kind: str) -> None:
    pytest.importorskip("torchao", reason="the extra quantised is not installed")
    from thanos.bench.decode import time_network

    model = tiny_model("llama", hidden_size=64, dtype=torch.bfloat16).eval().requires_grad_(False).cuda()
    with torch.inference_mode():
        before = model(input_ids=IDS.cuda()).logits
    quantise(model, kind)
    with torch.inference_mode():
        after = model(input_ids=IDS.cuda()).logits
    assert float((after - before).norm() / before.norm()) < (0.05 if kind == "int8" else 0.5)
    assert time_network(model, "tiny", context=5, new_tokens=3).tokens_per_second > 0
