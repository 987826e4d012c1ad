"""The dtype of the written weights: the input's, another one, or bfloat16 for a GGUF file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import thanos
from gguf_models import write_gguf
from helpers import save_tiny, tiny_model
from thanos.checkpoint.reader import SafetensorsCheckpoint
from thanos.errors import NumericsError, RecipeError
from thanos.model.opening import open_model
from thanos.model.source import resolve_model


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")


def recipe(text: Path, **changes: Any) -> thanos.Recipe:
    return thanos.Recipe(**{"calibration": str(text), "samples": 4, "sequence_length": 32, "device": "cpu"} | changes)


def read(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


@pytest.mark.parametrize("architecture", ["llama", "qwen3-moe", "gpt-2"])
@pytest.mark.parametrize(("input_dtype", "output_dtype"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_the_model_is_converted_before_it_is_pruned(
    tmp_path: Path, text_file: Path, architecture: str, input_dtype: str, output_dtype: str
) -> None:
    """The oracle is the same run on a folder that was saved in the other dtype."""
    own, other = (getattr(torch, dtype) for dtype in (input_dtype, output_dtype))
    save_tiny(tmp_path / "model", architecture, dtype=own)
    save_tiny(tmp_path / "converted", architecture, dtype=own)
    converted: Any = tiny_model(architecture, dtype=own)
    converted.to(other).save_pretrained(tmp_path / "converted")
    settings = {"dtype": "float32", "pattern": "2:4"}
    report = thanos.prune(
        tmp_path / "model", tmp_path / "out", recipe(text_file, **settings, output_dtype=output_dtype)
    )
    expected = thanos.prune(tmp_path / "converted", tmp_path / "expected", recipe(text_file, **settings))
    assert same(read(tmp_path / "out"), read(tmp_path / "expected"))
    assert {layer.dtype for layer in report.layers} == {output_dtype}
    assert report.totals["zeros_targeted"] == expected.totals["zeros_targeted"]
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == output_dtype
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == other
    assert 'output_dtype = "' + output_dtype in (tmp_path / "out/recipe.toml").read_text()


def test_every_shard_keeps_its_tensors(tmp_path: Path, text_file: Path) -> None:
    save_tiny(tmp_path / "model", max_shard_size="20KB")
    thanos.prune(tmp_path / "model", tmp_path / "out", recipe(text_file, output_dtype="float16"))
    before, after = SafetensorsCheckpoint(tmp_path / "model"), SafetensorsCheckpoint(tmp_path / "out")
    assert len(before.layout.shards) > 2
    assert [shard.name for shard in after.layout.shards] == [shard.name for shard in before.layout.shards]
    for name, info in before.tensors.items():
        assert (after.tensors[name].shard, after.tensors[name].dtype) == (info.shard, torch.float16)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_inputs_own_dtype_changes_no_byte(tiny_llama: Path, tmp_path: Path, text_file: Path) -> None:
    plain, named = (
        thanos.prune(tiny_llama, tmp_path / out, recipe(text_file, output_dtype=dtype))
        for out, dtype in (("plain", "auto"), ("named", "float32"))
    )
    assert plain.totals == named.totals
    first, second = (tmp_path / out / "model.safetensors" for out in ("plain", "named"))
    assert first.read_bytes() == second.read_bytes()
    assert "output_dtype" not in (tmp_path / "plain/recipe.toml").read_text()


def test_numbers_of_other_kinds_stay(tiny_llama: Path, tmp_path: Path, text_file: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    state = load_file(folder / "model.safetensors")
    state |= {"mask": torch.tensor([True, False]), "count": torch.tensor([3])}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    thanos.prune(folder, tmp_path / "out", recipe(text_file, output_dtype="bfloat16"))
    written = read(tmp_path / "out")
    assert torch.equal(written["mask"], state["mask"])
    assert torch.equal(written["count"], state["count"])


def test_a_number_beyond_float16(tiny_llama: Path, tmp_path: Path, text_file: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][3] = 70000.0
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        NumericsError, match=r"model\.norm\.weight holds 7e\+04, which is beyond float16; choose another"
    ):
        thanos.prune(folder, tmp_path / "out", recipe(text_file, output_dtype="float16"))
    assert not (tmp_path / "out").exists()


def test_an_unknown_dtype() -> None:
    with pytest.raises(RecipeError, match="output_dtype 'bf16' is unknown; choose one of auto, float32"):
        thanos.Recipe(output_dtype="bf16")


@pytest.mark.parametrize("name", ["tinyllama", "mixtral"])
def test_a_gguf_file_is_written_in_bfloat16(tmp_path: Path, text_file: Path, name: str) -> None:
    pytest.importorskip("gguf")
    path = write_gguf(tmp_path / "m.gguf", name, ("Q8_0", "Q4_0"))
    notes = []
    report = thanos.prune(
        path,
        tmp_path / "out",
        recipe(text_file, pattern="2:4"),
        on_event=lambda event: notes.append(event.message) if event.kind == "note" else None,
    )
    said = "the weights are written in bfloat16; --output-dtype float32 keeps the exact values of the GGUF file"
    assert said in notes
    assert said in report.warnings
    written, opened = read(tmp_path / "out"), open_model(resolve_model(path))
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    embedding = opened.checkpoint.read(opened.key_of["model.embed_tokens.weight"])
    assert torch.equal(written["model.embed_tokens.weight"], embedding.bfloat16())
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    weight = loaded.model.layers[0].self_attn.q_proj.weight
    assert int((weight != 0).reshape(-1, 4).sum(1).max()) <= 2


def test_a_gguf_file_keeps_its_numbers_in_float32(tmp_path: Path, text_file: Path) -> None:
    """Both are the runs on the folders that hold the same numbers."""
    pytest.importorskip("gguf")
    path = write_gguf(tmp_path / "m.gguf", "qwen2", ("Q8_0", "Q4_0"), parts=2)
    from thanos.model.loading import load_model

    source = resolve_model(path)
    for dtype in ("float32", "bfloat16"):
        folder = tmp_path / dtype
        load_model(source, dtype=dtype).save_pretrained(folder)
        source.tokenizer().save_pretrained(folder)
        settings = {"dtype": "float32", "pattern": "2:4"}
        thanos.prune(folder, tmp_path / f"expected {dtype}", recipe(text_file, **settings))
        thanos.prune(path, tmp_path / f"out {dtype}", recipe(text_file, **settings, output_dtype=dtype))
        assert same(read(tmp_path / f"out {dtype}"), read(tmp_path / f"expected {dtype}"))
