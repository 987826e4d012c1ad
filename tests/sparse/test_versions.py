"""Version 1 of the packed format, which had no tails: it is still read."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers import windows
from sparse_matrices import assert_close, random_weight, save_pruned, version_1
from thanos.errors import ModelError
from thanos.export.pack import pack
from thanos.export.unpack import unpack
from thanos.sparse import loader, packed_modules
from thanos.sparse.formats import PackedWeight, decode
from thanos.sparse.modules import PackedLinear
from thanos.sparse.storage import as_latest, check_weight, parse_settings


def load(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(windows(2, 17)).logits


def make_version_1(folder: Path) -> int:
    """Turn a packed folder into what version 1 of the format was; return how many layers are otherwise now."""
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    settings, changed = config["quantization_config"], 0
    for name, spec in parse_settings(settings, "model").items():
        if spec.format == "bitmap":
            packed = PackedWeight(spec, tensors[f"{name}.weight_words"], tensors[f"{name}.weight_offsets"])
            old = version_1(decode(packed))
            assert old.offsets is not None
            tensors[f"{name}.weight_words"], tensors[f"{name}.weight_offsets"] = old.words, old.offsets
            settings["layers"][name]["words"], changed = old.spec.words, changed + 1
    settings["format_version"] = 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return changed


def test_a_folder_of_the_version_before_is_read_and_saved_in_this_one(tmp_path, monkeypatch):
    monkeypatch.setenv(loader.UNPACK, "never")
    source, packed = save_pruned(tmp_path / "model"), tmp_path / "packed"
    pack(source, packed, least_weights=1)
    expected = logits(load(packed))
    assert make_version_1(packed) > 0
    model = load(packed)
    assert all(layer.spec.version == 2 for layer in packed_modules(model).values())
    assert torch.equal(logits(model), expected)
    unpack(packed, tmp_path / "dense")
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]["format_version"] == 2
    assert torch.equal(logits(load(tmp_path / "saved")), expected)
    unpack(tmp_path / "saved", tmp_path / "again")
    wanted = load_file(source / "model.safetensors")
    for folder in ("dense", "again"):
        got = load_file(tmp_path / folder / "model.safetensors")
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("value", [-1, 1 << 29, (1 << 31) - 1, -(1 << 31)])
def test_offsets_of_version_1_that_no_matrix_has_are_refused(value):
    weight = random_weight(64, 96, 0.6)
    old = version_1(weight)
    new = as_latest(old, "layer")
    check_weight(new, "layer")
    assert torch.equal(decode(new), weight)
    assert old.offsets is not None
    for index in range(7):
        offsets = old.offsets.clone()
        offsets[index] = value
        with pytest.raises(ModelError, match="offsets that do not suit"):
            as_latest(PackedWeight(old.spec, old.words, offsets), "layer")


def test_a_module_takes_tensors_of_the_version_before():
    weight = random_weight(64, 96, 0.6)
    old = version_1(weight)
    module = PackedLinear(old.spec, bias=False)
    module.load_state_dict({"weight_words": old.words, "weight_offsets": old.offsets})
    assert module.spec.version == 2
    x = torch.randn(2, 96).bfloat16()
    assert torch.equal(module.weight, weight)
    assert_close(module(x), weight, x)
    module.load_state_dict(module.state_dict())
    assert torch.equal(module.weight, weight)
