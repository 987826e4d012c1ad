"""What is fetched from the hub: the index first, then the weights that it names, and nothing that no run reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from helpers import save_tiny, tiny_model
from thanos.checkpoint.weight_files import INDEX_NAME, SINGLE_NAME
from thanos.errors import ModelError
from thanos.model.hub import download
from thanos.model.loading import load_model
from thanos.model.opening import open_model
from thanos.model.source import resolve_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"

AUXILIARY = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "LICENSE",
    "README.md",
    "additional_chat_templates/tool.jinja",
}
CODE = {"modeling_x.py", "parts/helper.py"}
NEVER = {
    "consolidated.safetensors",
    "consolidated.00.pth",
    "original/consolidated.00.pth",
    "original/params.json",
    "original/tokenizer.model",
    "fp16/model.safetensors",
    "fp16/config.json",
    "model.fp16.safetensors",
    "pytorch_model.bin",
    "onnx/model.onnx",
    "tf_model.h5",
    "model-q4.gguf",
    "adapter_model.safetensors",
}


class Hub:
    """A repository in a folder, served as ``snapshot_download`` would; keeps what it was asked for."""

    def __init__(self, folder: Path) -> None:
        self.repository, self.cache = folder / "repository", folder / "snapshots" / COMMIT
        self.calls: list[tuple[str, str | None]] = []
        self.fetched: list[list[str]] = []

    def add(self, *names: str, text: str = "{}") -> None:
        for name in names:
            path = self.repository / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def snapshot_download(self, name: str, *, revision: str | None = None, **patterns: Any) -> str:
        self.calls.append((name, revision))
        there = [str(path.relative_to(self.repository)) for path in self.repository.rglob("*") if path.is_file()]
        wanted = sorted(filter_repo_objects(there, **patterns))
        self.fetched.append(wanted)
        for name in wanted:
            (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.repository / name, self.cache / name)
        return str(self.cache)

    @property
    def names(self) -> set[str]:
        return {name for fetched in self.fetched for name in fetched}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path)
    made.add(*AUXILIARY, *CODE, *NEVER)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    return made


def index(*shards: str) -> str:
    return json.dumps({"metadata": {}, "weight_map": {f"tensor{n}": shard for n, shard in enumerate(shards)}})


def test_the_index_comes_first_and_then_the_shards_that_it_names(hub: Hub) -> None:
    shards = {f"model-{n:05d}-of-00002.safetensors" for n in (1, 2)}
    hub.add(*shards, "model-00003-of-00003.safetensors", SINGLE_NAME)
    hub.add(INDEX_NAME, text=index(*sorted(shards)))
    assert download("org/model", code=False) == hub.cache
    assert INDEX_NAME in hub.fetched[0]
    assert not any(name.endswith(".safetensors") for name in hub.fetched[0])
    assert hub.names == AUXILIARY | shards | {INDEX_NAME}
    assert hub.calls == [("org/model", None), ("org/model", COMMIT)], "both of one commit"


def test_a_single_file(hub: Hub) -> None:
    hub.add(SINGLE_NAME)
    download("org/model", code=False)
    assert hub.names == AUXILIARY | {SINGLE_NAME}


def test_code_only_where_it_is_trusted(hub: Hub) -> None:
    hub.add(SINGLE_NAME)
    download("org/model", code=True)
    assert hub.names == AUXILIARY | CODE | {SINGLE_NAME}


def test_shards_are_names_and_no_patterns(hub: Hub) -> None:
    hub.add("a[1].safetensors", "a1.safetensors", "a*.safetensors", "ab.safetensors")
    hub.add(INDEX_NAME, text=index("a[1].safetensors", "a*.safetensors"))
    download("org/model", code=False)
    assert {name for name in hub.names if name.endswith(".safetensors")} == {"a[1].safetensors", "a*.safetensors"}


@pytest.mark.parametrize("shard", ["../secret.safetensors", "original/a.safetensors", "pytorch_model.bin"])
def test_an_index_that_names_what_it_must_not(hub: Hub, shard: str) -> None:
    hub.add(INDEX_NAME, text=index(shard))
    with pytest.raises(ModelError, match=INDEX_NAME):
        download("org/model", code=False)
    assert len(hub.calls) == 1, "nothing more is fetched"


def test_an_adapter_on_the_hub_is_named_as_one(hub: Hub) -> None:
    hub.add("adapter_config.json")
    with pytest.raises(ModelError, match=r"org/model holds an adapter, adapter_config\.json.*merge it first"):
        resolve_model("org/model")


def test_what_the_hub_raises_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise RuntimeError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=r"org/model .*cannot be downloaded from the hub \(no route\)"):
        download("org/model", code=False)


def test_a_model_in_the_cache_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client itself, offline, on a cache as it makes them: links to blobs, and a file with the commit of each branch."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    store = tmp_path / "models--org--model"
    for folder in ("refs", "blobs", f"snapshots/{COMMIT}"):
        (store / folder).mkdir(parents=True)
    (store / "refs" / "main").write_text(COMMIT)
    saved = save_tiny(tmp_path / "saved", max_shard_size="40KB")
    for number, path in enumerate(sorted(saved.iterdir())):
        shutil.move(path, store / "blobs" / str(number))
        (store / "snapshots" / COMMIT / path.name).symlink_to(f"../../blobs/{number}")
    source = resolve_model("org/model")
    assert source.folder == store / "snapshots" / COMMIT
    loaded, expected = load_model(source).state_dict(), tiny_model().state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    opened = open_model(source)
    for name, tensor in expected.items():
        assert torch.equal(opened.checkpoint.read(opened.key_of[name]), tensor), name
