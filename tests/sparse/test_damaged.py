"""Damaged and hostile packed folders in transformers: refused in one line, before anything of them is used."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import thanos
from sparse_matrices import save_pruned
from thanos.errors import ModelError
from thanos.export.pack import pack
from thanos.sparse import loader


@pytest.fixture(autouse=True)
def _stay_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(loader.UNPACK, "never")


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    pack(save_pruned(tmp_path / "model"), tmp_path / "packed", least_weights=1)
    return tmp_path / "packed"


def load(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


@pytest.mark.parametrize(
    ("name", "index", "value"),
    [("model.layers.0.mlp.up_proj.weight_words", 3, -1), ("model.layers.1.mlp.up_proj.weight_offsets", 1, 10**9)],
)
def test_a_hostile_file_is_refused_before_it_is_used(packed, name, index, value):
    tensors = load_file(packed / "model.safetensors")
    tensors[name][index] = value
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="the packed model is damaged"):
        load(packed)


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors, layers: tensors.pop(f"{UP}.weight_words"), "lacks a tensor weight_words"),
        (
            lambda tensors, layers: tensors.update({f"x.{UP}.weight_words": tensors[f"{UP}.weight_words"].clone()}),
            "no layer",
        ),
        (lambda tensors, layers: tensors.update({f"{UP}.weight": torch.zeros(64, 32).bfloat16()}), "packed and dense"),
        (
            lambda tensors, layers: tensors.update({f"{UP}.weight_words": tensors[f"{UP}.weight_words"].double()}),
            "float64",
        ),
        (lambda tensors, layers: layers.update({f"model.{UP}": layers[UP]}), "lacks a tensor"),
        (
            lambda tensors, layers: layers[UP].update(dtype="float16"),
            "torch.bfloat16 and torch.float16; a model runs in one",
        ),
        (lambda tensors, layers: layers[UP].update(dtype=[]), r"the dtype \[\], not bfloat16"),
        (lambda tensors, layers: layers.update({"a\nb": layers.pop(UP)}), r"'a\\nb', which cannot be a name"),
    ],
)
def test_files_that_do_not_suit_the_config_are_refused_in_one_line(packed, change, words, text_file):
    tensors, config = load_file(packed / "model.safetensors"), json.loads((packed / "config.json").read_text())
    change(tensors, config["quantization_config"]["layers"])
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=words) as caught:
        thanos.evaluate(packed, text=str(text_file), sequence_length=32, max_windows=4, device="cpu")
    assert str(caught.value).isprintable()


def test_a_layer_that_is_listed_twice_is_refused(packed):
    tensors, config = load_file(packed / "model.safetensors"), json.loads((packed / "config.json").read_text())
    layers = config["quantization_config"]["layers"]
    layers[f"model.{UP}"] = layers[UP]
    tensors[f"model.{UP}.weight_words"] = tensors[f"{UP}.weight_words"].clone()
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="lists a packed layer twice"):
        load(packed)
