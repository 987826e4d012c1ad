"""Which files hold the weights: the same for every reader, transformers among them, or a refusal that names both."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import thanos
from helpers import save_tiny, tiny_model
from thanos.calibration.making import make_calibration
from thanos.checkpoint.reader import SafetensorsCheckpoint
from thanos.checkpoint.weight_files import INDEX_NAME, SINGLE_NAME
from thanos.cli import run
from thanos.errors import ModelError
from thanos.evaluation.inspect import inspect_checkpoint
from thanos.evaluation.perplexity import evaluate
from thanos.model import loading
from thanos.model.fingerprint import model_sha256
from thanos.model.loading import adapter_notes, load_model
from thanos.model.source import ModelSource, resolve_model
from thanos.planning.plan import plan


@pytest.fixture
def single(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "single"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = save_tiny(tmp_path / "sharded", max_shard_size="40KB")
    assert (folder / INDEX_NAME).is_file()
    assert not (folder / SINGLE_NAME).exists()
    return folder


def another(path: Path) -> None:
    """Weights of another model with the same config."""
    tiny_model(seed=9).save_pretrained(path.parent / "other")
    shutil.move(path.parent / "other" / SINGLE_NAME, path)
    shutil.rmtree(path.parent / "other")


def lora(path: Path) -> None:
    save_file({"base_model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 32)}, path)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(folder: Path, *says: str) -> None:
    """Every reader refuses alike, on one line."""
    for read in (resolve_model, lambda path: load_model(ModelSource(str(path), path)), SafetensorsCheckpoint):
        with pytest.raises(ModelError) as caught:
            read(folder)
        text = str(caught.value)
        assert "\n" not in text
        for part in (str(folder), *says):
            assert part in text


# --- two sets of weights ------------------------------------------------------------------------------------------------


def test_a_single_file_of_another_model_beside_the_shards(sharded: Path) -> None:
    another(sharded / SINGLE_NAME)
    refused(sharded, INDEX_NAME, SINGLE_NAME, "to another folder")


def test_every_command_refuses_two_sets(sharded: Path, text_file: Path, tmp_path: Path, tiny_llama: Path) -> None:
    another(sharded / SINGLE_NAME)
    recipe = thanos.Recipe(calibration=str(text_file), samples=1, sequence_length=16)
    source = ModelSource(str(sharded), sharded)
    commands: dict[str, Callable[[], Any]] = {
        "prune": lambda: thanos.prune(sharded, tmp_path / "out", recipe),
        "plan": lambda: plan(sharded, tmp_path / "out", recipe),
        "inspect": lambda: inspect_checkpoint(sharded),
        "eval": lambda: evaluate(sharded, text=str(text_file), sequence_length=16),
        "eval --dense": lambda: evaluate(
            tiny_llama, text=str(text_file), sequence_length=16, max_windows=1, dense=sharded
        ),
        "calibration self": lambda: make_calibration(
            source, recipe.replace(calibration="self"), torch.device("cpu"), lambda event: None
        ),
        "fingerprint of a study": lambda: model_sha256(source),
    }
    for name, command in commands.items():
        with pytest.raises(ModelError, match=f"{INDEX_NAME}.*{re.escape(SINGLE_NAME)}"):
            command()
        assert not (tmp_path / "out").exists(), name


def test_an_index_of_the_single_file_itself_is_one_set(single: Path) -> None:
    names = load_file(single / SINGLE_NAME)
    (single / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, SINGLE_NAME)}))
    same_as_transformers(single)


def test_weights_that_the_config_names(single: Path) -> None:
    edit_config(single, transformers_weights=SINGLE_NAME)
    same_as_transformers(single)
    another(single / "other.safetensors")
    edit_config(single, transformers_weights="other.safetensors")
    refused(single, "other.safetensors", SINGLE_NAME, "transformers_weights")


# --- what lies beside and does no harm ------------------------------------------------------------------------------------


def same_as_transformers(folder: Path) -> None:
    """Our reader and transformers' give the same tensors, and they are the tiny model's."""
    reference = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    resolve_model(folder)
    checkpoint = SafetensorsCheckpoint(folder)
    assert checkpoint.tensors.keys() == reference.keys()
    for name, tensor in tiny_model().state_dict().items():
        assert torch.equal(checkpoint.read(name), tensor), name
        assert torch.equal(reference[name], tensor), name


@pytest.mark.parametrize(
    "name",
    [
        "consolidated.safetensors",
        "model.fp16.safetensors",
        "consolidated-00001-of-00002.safetensors",
        "sub/model.safetensors",
    ],
)
def test_other_weights_that_nobody_reads(single: Path, sharded: Path, name: str) -> None:
    for folder in (single, sharded):
        (folder / name).parent.mkdir(exist_ok=True)
        another(folder / name)
        same_as_transformers(folder)


def test_a_second_index_that_nobody_reads_is_not_copied(sharded: Path, text_file: Path, tmp_path: Path) -> None:
    names = ["model.safetensors.index.fp16.json", "consolidated.safetensors.index.json", "pytorch_model.bin.index.json"]
    for name in names:
        (sharded / name).write_text(json.dumps({"metadata": {}, "weight_map": {"a": "none.safetensors"}}))
    same_as_transformers(sharded)
    recipe = thanos.Recipe(method="magnitude", calibration=str(text_file), samples=1, sequence_length=16)
    thanos.prune(sharded, tmp_path / "out", recipe)
    assert not any((tmp_path / "out" / name).exists() for name in names)
    assert (tmp_path / "out" / INDEX_NAME).is_file()


def test_links_as_the_hubs_cache_has_them(sharded: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "00"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(sharded.iterdir())):
        shutil.move(path, blobs / str(number))
        (snapshot / path.name).symlink_to(blobs / str(number))
    same_as_transformers(snapshot)
    index = (snapshot / INDEX_NAME).resolve()
    index.unlink()
    refused(snapshot, INDEX_NAME, "link", "again")


# --- adapters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_beside_the_base_weights(single: Path, sharded: Path, name: str) -> None:
    for folder in (single, sharded):
        (folder / name).write_text("{}")
        refused(folder, name, "adapter", "merge_and_unload", "move the adapter's files away")


@pytest.mark.parametrize("name", ["lora.safetensors", "model-lora.safetensors"])
def test_an_adapter_under_another_name(single: Path, name: str) -> None:
    lora(single / name)
    refused(single, name, SINGLE_NAME, "merge_and_unload")


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"]
)
@pytest.mark.parametrize("config", [True, False])
def test_a_folder_with_an_adapter_alone(single: Path, name: str, config: bool) -> None:
    (single / SINGLE_NAME).unlink()
    if not config:
        (single / "config.json").unlink()
    lora(single / name) if name.startswith("pytorch") else (single / name).write_text("{}")
    with pytest.raises(ModelError, match=rf"{name}.*merge it first.*merge_and_unload\(\)\.save_pretrained"):
        resolve_model(single)


# --- no weights, and indices that name what they must not -----------------------------------------------------------------


def test_shards_without_their_index(sharded: Path) -> None:
    (sharded / INDEX_NAME).unlink()
    refused(sharded, "model-00001-of-", f"need their index, {INDEX_NAME}")


def test_a_variant_alone(single: Path) -> None:
    (single / SINGLE_NAME).rename(single / "model.fp16.safetensors")
    refused(single, "model.fp16.safetensors", "rename")


def test_the_publishers_own_form_alone(single: Path) -> None:
    (single / SINGLE_NAME).rename(single / "consolidated.safetensors")
    refused(single, "consolidated.safetensors", "save_pretrained")


def test_a_link_to_nothing(single: Path) -> None:
    (single / SINGLE_NAME).unlink()
    (single / SINGLE_NAME).symlink_to("../blobs/none")
    refused(single, SINGLE_NAME, "link to a file that does not exist")


@pytest.mark.parametrize(
    ("shard", "says"),
    [
        ("sub/a.safetensors", "not in the same folder"),
        ("../a.safetensors", "not in the same folder"),
        ("/a.safetensors", "not in the same folder"),
        ("pytorch_model.bin", "not a .safetensors file"),
    ],
)
def test_an_index_that_names_what_it_must_not(sharded: Path, shard: str, says: str) -> None:
    (sharded / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": {"a": shard}}))
    refused(sharded, INDEX_NAME, shard, says)
    with pytest.raises(ModelError) as caught:
        resolve_model(sharded)
    assert "damaged" not in str(caught.value)


def test_the_fingerprint_covers_the_weights_that_are_read_and_no_others(single: Path) -> None:
    before = model_sha256(resolve_model(single))
    another(single / "consolidated.safetensors")
    assert model_sha256(resolve_model(single)) == before
    another(single / SINGLE_NAME)
    assert model_sha256(resolve_model(single)) != before


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 5\n"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_clone_without_git_lfs(single: Path, name: str, text_file: Path) -> None:
    """Its large files are texts that point to the content: nothing is damaged."""
    (single / name).write_text(POINTER)
    recipe = thanos.Recipe(calibration=str(text_file), samples=1, sequence_length=16, device="cpu")
    for act in (
        lambda: thanos.prune(single, single.parent / "out", recipe),
        lambda: thanos.evaluate(single, text=str(text_file), sequence_length=16, device="cpu"),
    ):
        with pytest.raises(ModelError, match=rf"{name} is a pointer of Git LFS.*run git lfs pull") as caught:
            act()
        assert "damaged" not in str(caught.value)


def test_a_gguf_file_of_a_clone_without_git_lfs(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text(POINTER)
    with pytest.raises(ModelError, match=r"m\.gguf is a pointer of Git LFS"):
        resolve_model(tmp_path / "m.gguf")


def with_adapter(folder: Path) -> None:
    """Add a tensor of an adapter to the weights of a folder."""
    state = load_file(folder / "model.safetensors")
    state["model.layers.0.self_attn.q_proj.lora_A.default.weight"] = torch.ones(2, 32)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_an_adapter_among_the_weights_is_named(single: Path, text_file: Path) -> None:
    with_adapter(single)
    recipe = thanos.Recipe(method="magnitude", calibration=str(text_file), samples=1, sequence_length=16, device="cpu")
    report = thanos.prune(single, single.parent / "out", recipe)
    [note] = [line for line in report.warnings if "adapter" in line]
    assert note.startswith("the weights contain an adapter (1 tensor, such as model.layers.0.self_attn.q_proj.lora_A")


def test_every_command_that_loads_a_model_names_the_adapter_among_its_weights(
    single: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_tiny(tmp_path / "plain")
    text = ["--text", str(text_file), "--sequence-length", "16", "--max-windows", "1", "--device", "cpu"]
    decode = ["--context", "4", "--new-tokens", "1", "--device", "cpu"]
    said = {}
    for adapter in (False, True):
        if adapter:
            with_adapter(single)
        for words in (
            ["eval", str(single), *text],
            ["eval", str(other), "--dense", str(single), *text],
            ["bench", "decode", str(single), *decode],
        ):
            assert run(words) == 0
            said[adapter, tuple(words)] = capsys.readouterr().err
    note = (
        f"the weights of {single.name} contain an adapter (1 tensor, such as "
        "model.layers.0.self_attn.q_proj.lora_A.default.weight), which transformers does not read: it has no effect; merge "
        "it first if it belongs to the model"
    )
    for (adapter, words), lines in said.items():
        assert lines.count(note) == lines.count("adapter") == adapter, (words, lines)


def test_parameters_of_the_model_itself_are_no_adapter_without_effect(
    single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_adapter(single)
    assert len(adapter_notes(resolve_model(single))) == 1
    own = torch.nn.ModuleDict({"q_proj": torch.nn.ModuleDict({"lora_A": torch.nn.Linear(2, 2)})})
    monkeypatch.setattr(loading, "build_fused_model", lambda *_, **__: torch.nn.ModuleDict({"layer": own}))
    assert adapter_notes(resolve_model(single)) == []
