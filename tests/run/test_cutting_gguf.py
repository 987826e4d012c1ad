"""Smaller models from GGUF files: the outputs of the dequantised model with the units that went zeroed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import thanos
from gguf_models import write_gguf
from helpers import windows
from shrinking import load, skip, zero_columns
from thanos.calibration.windows import Calibration
from thanos.model.loading import load_model
from thanos.model.source import resolve_model
from whole_models import LENGTH, SAMPLES, recipe

pytest.importorskip("gguf")


def assert_same_as(model: Any, out: Path) -> None:
    ids = windows(2, 40, seed=5)
    with torch.inference_mode():
        found, expected = (one(input_ids=ids).logits for one in (load(out), model))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma-2", "gemma-3", "phi-3"])
@pytest.mark.parametrize("pattern", ["neurons", "heads", "blocks"])
def test_a_gguf_file_becomes_a_smaller_folder(pattern: str, name: str, text_file: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", name, ("Q8_0", "Q4_0"), parts=2)
    ids = windows(SAMPLES, LENGTH)
    given = Calibration(ids, str(text_file), "packed", 0, 1)
    changes: dict[str, Any] = {"multiple_of": 8} if pattern == "neurons" else {"sparsity": 0.5}
    if pattern == "blocks":
        changes = {"sparsity": 0.34}
    made = recipe(text_file, **{"pattern": pattern, "method": "magnitude", "output_dtype": "float32"} | changes)
    planned = thanos.plan(path, tmp_path / "out", made, calibration=given).cut if name == "llama" else {}
    report = thanos.prune(path, tmp_path / "out", made, calibration=given)
    model: Any = load_model(resolve_model(path), dtype="float32").eval()
    for layer in report.layers:
        gone = torch.tensor(layer.removed_units or [], dtype=torch.int64)
        if pattern == "heads":
            width = model.get_submodule(layer.name).in_features // report.cut["units"]["heads"]["before"]
            gone = (gone[:, None] * width + torch.arange(width)).flatten()
        zero_columns(model.get_submodule(layer.name), gone)
    for index in report.cut.get("dropped_blocks", []):
        skip(model.model.layers[index])
    assert_same_as(model, tmp_path / "out")
    assert sum(parameter.numel() for parameter in load(tmp_path / "out").parameters()) == report.cut["parameters_after"]
    if planned:
        assert planned["bytes_after"] == report.cut["bytes_after"]
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
        assert all(getattr(found, field) == size["after"] for field, size in planned["config"].items())
