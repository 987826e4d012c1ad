"""The GGUF file of random weights: what it holds, and that it can be pruned."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

import thanos
from helpers import benchmark_script
from thanos.model.loading import load_model
from thanos.model.source import resolve_model

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
SIZES = argparse.Namespace(hidden=256, intermediate=96, blocks=2, kv_heads=1, vocabulary=300)


def test_the_file_is_read_and_pruned(tmp_path: Path, text_file: Path) -> None:
    file = tmp_path / "model.gguf"
    benchmark_script("make_gguf").write(file, SIZES)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    kinds = {tensor.tensor_type.name for tensor in stored.values()}
    assert kinds == {"Q4_1", "Q8_0", "F32"}
    source = resolve_model(file)
    state = load_model(source).state_dict()
    for name, tensor in (
        ("model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight"),
        ("lm_head.weight", "output.weight"),
    ):
        values = gguf.quants.dequantize(stored[tensor].data, stored[tensor].tensor_type)
        assert state[name].numpy() == pytest.approx(values)
        assert abs(values).max() < 0.05
        assert values.std() > 0.01
    assert len(source.tokenizer()) == 300
    recipe = thanos.Recipe(
        pattern="2:4", calibration=str(text_file), samples=2, sequence_length=32, device="cpu", block_size=32
    )
    report = thanos.prune(file, tmp_path / "out", recipe)
    assert report.totals["sparsity_targeted"] == 0.5
