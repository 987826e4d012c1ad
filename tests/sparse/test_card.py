"""What a saved packed model says about loading it, and what a model says that runs without a kernel."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

import thanos
from helpers import windows
from sparse_matrices import save_pruned
from thanos.export.pack import pack
from thanos.sparse import loader, ops, packed_modules
from thanos.system import library_warnings


@pytest.fixture(autouse=True)
def _stay_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(loader.UNPACK, "never")
    monkeypatch.setattr(library_warnings, "_SAID", set())


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    pack(save_pruned(tmp_path / "model", "llama"), tmp_path / "packed", least_weights=1)
    return tmp_path / "packed"


def load(folder: Path, kind: Any = AutoModelForCausalLM) -> Any:
    return kind.from_pretrained(folder, dtype="auto").eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(windows(2, 17)).logits


def test_a_saved_packed_model_says_how_to_load_it(packed: Path, tmp_path: Path) -> None:
    load(packed).save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert card.startswith("## Packed weights\n\n21 linear layers")
    sizes = " ".join(line for line in card.splitlines() if " GB" in line)
    assert sizes in " ".join((packed / "README.md").read_text().splitlines()), "the bytes that pack counted"
    code = card.partition("```python\n")[2].partition("```")[0].replace("THIS FOLDER", str(tmp_path / "saved"))
    check = f"{code}\nfrom thanos.sparse import packed_modules\nassert len(packed_modules(model)) == 21"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.parametrize("before", ["# mine\n", "# mine\n\n## Packed weights\n\nas pack wrote it\n"])
def test_a_card_that_is_there_stays(packed: Path, tmp_path: Path, before: str) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "README.md").write_text(before)
    model = load(packed)
    model.save_pretrained(tmp_path / "saved")
    model.save_pretrained(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert card.startswith("# mine\n\n## Packed weights\n")
    assert card.count("## Packed weights") == 1


def test_no_card_says_so_of_a_dense_model_or_of_another_process(packed: Path, tmp_path: Path) -> None:
    model = load(packed)
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other" / "README.md").exists()
    model.dequantize()
    model.save_pretrained(tmp_path / "dense")
    assert not (tmp_path / "dense" / "README.md").exists()


def test_copies_and_models_without_a_head_write_it_too(packed: Path, tmp_path: Path) -> None:
    model = load(packed)
    for number, one in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)), load(packed, AutoModel))):
        one.save_pretrained(tmp_path / str(number))
        assert "import thanos.sparse" in (tmp_path / str(number) / "README.md").read_text()
    config = json.loads((tmp_path / "0" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert isinstance(model, type(AutoModelForCausalLM.from_config(model.config)))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def test_the_card_of_a_packed_folder_does_not_call_it_plain(text_file: Path, tmp_path: Path) -> None:
    source = save_pruned(tmp_path / "model", "llama")
    settings = {"calibration": str(text_file), "samples": 1, "sequence_length": 16, "device": "cpu"}
    thanos.prune(source, tmp_path / "pruned", thanos.Recipe(method="magnitude", **settings))
    plain = (tmp_path / "pruned" / "README.md").read_text()
    assert "Thanos is not needed to load it" in plain
    assert "the files are as large as before" in plain
    pack(tmp_path / "pruned", tmp_path / "packed", least_weights=1)
    card = (tmp_path / "packed" / "README.md").read_text()
    assert "not needed" not in card
    assert "as large as before" not in card
    assert "This is a packed checkpoint, which needs Thanos: see Packed weights." in card
    thanos.unpack(tmp_path / "packed", tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_bytes() == (tmp_path / "pruned" / "README.md").read_bytes()


def test_a_device_without_a_kernel_is_named_once(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.cpu, "lacking", lambda: "it is of another age")
    model = load(packed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first, second = logits(model), logits(model)
    assert torch.equal(first, second)
    assert [str(one.message) for one in caught] == [
        "packed layers run on cpu without a kernel (it is of another age): every call decodes their weights, which is slow; "
        "model.dequantize() makes them dense"
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logits(model.dequantize())
    assert not caught


def test_a_device_with_a_kernel_says_nothing(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even with more tokens than the kernel takes, for which decoding is faster."""
    monkeypatch.setattr(ops.cpu, "lacking", lambda: "")
    monkeypatch.setattr(ops.cpu, "MOST_TOKENS", 0)
    model = load(packed)
    assert packed_modules(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(model)
