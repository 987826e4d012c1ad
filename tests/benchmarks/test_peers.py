"""The peers' scores against their formulas, written out unit by unit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import ROOT, save_tiny, windows
from shrinking import WITH_HEADS, load
from thanos.shrink.units import HEADS, NEURONS, units_of


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import peers

    yield peers
    del sys.modules["peers"]


def test_flap_is_the_variance_of_the_input_times_the_norm_of_the_column(peers: Any, tmp_path: Path) -> None:
    model = load(save_tiny(tmp_path / "model", "qwen2", **WITH_HEADS))
    units = {"model.layers.1.self_attn.o_proj": units_of(model, model.model.layers, HEADS)[1][0]}
    layer, seen = model.model.layers[1].self_attn.o_proj, []
    ids = windows(3, 20)
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().double().flatten(0, 1)))
    for row in ids:
        model(input_ids=row[None])
    handle.remove()
    x = torch.cat(seen)
    (found,) = peers.flap_scores(model, units, ids).values()
    for unit in range(4):
        columns = range(16 * unit, 16 * unit + 16)
        expected = sum(x[:, j].var() * layer.weight[:, j].double().square().sum() for j in columns)
        torch.testing.assert_close(found[unit], expected)


def test_llm_pruner_sums_weight_times_gradient_over_the_unit(peers: Any, tmp_path: Path) -> None:
    model = load(save_tiny(tmp_path / "model", "phi-3")).requires_grad_(False)
    units = {"model.layers.0.mlp.down_proj": units_of(model, model.model.layers, NEURONS)[0][0]}
    ids = windows(2, 20)
    (found,) = peers.taylor_scores(model, units, ids).values()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    mlp = model.model.layers[0].mlp.requires_grad_(True)
    model(input_ids=ids, labels=ids).loss.backward()  # rows of the same length: the mean of their means
    down, both = (weight * weight.grad for weight in (mlp.down_proj.weight, mlp.gate_up_proj.weight))
    for unit in (0, 17, 63):
        expected = down[:, unit].abs().sum() + both[unit].abs().sum() + both[64 + unit].abs().sum()
        torch.testing.assert_close(found[unit].float(), expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("score", ["flap", "llm-pruner"])
def test_it_writes_a_smaller_model(
    peers: Any, score: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    save_tiny(tmp_path / "model")
    how = ["--score", score, "--share", "0.25", "--multiple-of", "8", "--samples", "2", "--sequence-length", "32"]
    paths = [str(tmp_path / "model"), str(tmp_path / "out"), "--calibration", str(text_file), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["peers.py", *paths, *how])
    assert peers.main() == 0
    assert json.loads(capsys.readouterr().out)["units_that_stay"] == 48
    assert load(tmp_path / "out").config.intermediate_size == 48
