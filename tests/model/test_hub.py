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
from thanos.checkpoint.weight_files import INDEX_NAME, SINGLE_NAME, find_weights
from thanos.errors import ModelError
from thanos.model import hub as client
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
}


class Hub:
    """A repository in a folder, served as ``snapshot_download`` would; keeps what it was asked for."""

    def __init__(self, folder: Path) -> None:
        self.repository, self.cache = folder / "repository", folder / "snapshots" / COMMIT
        self.calls: list[tuple[str, str | None]] = []
        self.fetched: list[list[str]] = []
        self.listed: list[tuple[str, str | None]] = []

    def add(self, *names: str, text: str = "{}") -> None:
        for name in names:
            path = self.repository / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def snapshot_download(self, name: str, *, revision: str | None = None, **patterns: Any) -> str:
        self.calls.append((name, revision))
        wanted = sorted(filter_repo_objects(self.there(), **patterns))
        self.fetched.append(wanted)
        for name in wanted:
            (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.repository / name, self.cache / name)
        return str(self.cache)

    def there(self) -> list[str]:
        return [str(path.relative_to(self.repository)) for path in self.repository.rglob("*") if path.is_file()]

    def list_repo_files(self, name: str, *, revision: str | None = None) -> list[str]:
        self.listed.append((name, revision))
        return self.there()

    @property
    def names(self) -> set[str]:
        return {name for fetched in self.fetched for name in fetched}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path)
    made.add(*AUXILIARY, *CODE, *NEVER)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", made.list_repo_files)
    return made


def download(name: str, *, code: bool) -> Path:
    return client.download(name, code=code, check=lambda folder, listed: find_weights(folder, name, listed=listed))


def index(*shards: str) -> str:
    return json.dumps({"metadata": {}, "weight_map": {f"tensor{n}": shard for n, shard in enumerate(shards)}})


def test_the_index_comes_first_and_then_the_shards_that_it_names(hub: Hub) -> None:
    shards = {f"model-{n:05d}-of-00002.safetensors" for n in (1, 2)}
    hub.add(*shards, "model-00003-of-00003.safetensors")
    hub.add(INDEX_NAME, text=index(*sorted(shards)))
    assert download("org/model", code=False) == hub.cache
    assert INDEX_NAME in hub.fetched[0]
    assert not any(name.endswith(".safetensors") for name in hub.fetched[0])
    assert hub.names == AUXILIARY | shards | {INDEX_NAME}
    assert hub.calls == [("org/model", None), ("org/model", COMMIT)], "both of one commit"
    assert hub.listed == [("org/model", COMMIT)]


def test_shards_and_a_single_file_are_refused_as_in_a_folder(hub: Hub, tmp_path: Path) -> None:
    hub.add("a.safetensors", "b.safetensors", SINGLE_NAME)
    hub.add(INDEX_NAME, text=index("a.safetensors", "b.safetensors"))
    said = []
    for model in ("org/model", hub.repository):
        with pytest.raises(ModelError, match="holds weights twice") as caught:
            resolve_model(model)
        said.append(str(caught.value).removeprefix(f"{model} "))
    assert said[0] == said[1].replace("; move", "; download the model and move")
    assert all(name in said[0] for name in (INDEX_NAME, f"transformers would read {SINGLE_NAME}"))
    assert len(hub.calls) == 1, "before anything large is fetched"


def test_an_index_that_names_the_single_file(hub: Hub) -> None:
    hub.add(SINGLE_NAME)
    hub.add(INDEX_NAME, text=index(SINGLE_NAME))
    download("org/model", code=False)
    assert hub.names == AUXILIARY | {INDEX_NAME, SINGLE_NAME}


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_beside_the_weights_is_refused_before_they_are_fetched(hub: Hub, name: str) -> None:
    hub.add(SINGLE_NAME, name)
    with pytest.raises(ModelError, match=rf"^org/model holds an adapter, {name}, and the base weights"):
        download("org/model", code=False)
    assert SINGLE_NAME not in hub.names


def test_config_that_names_other_weights_is_refused_before_they_are_fetched(hub: Hub) -> None:
    hub.add(SINGLE_NAME)
    hub.add("config.json", text=json.dumps({"transformers_weights": "other.safetensors"}))
    with pytest.raises(ModelError, match=r"config\.json names the weights 'other\.safetensors'"):
        download("org/model", code=False)
    assert SINGLE_NAME not in hub.names


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, r"is quantised \(gptq\)"),
        ({"auto_map": {"AutoModel": "x.X"}}, "needs Python code"),
    ],
)
def test_a_config_that_is_refused_costs_no_download_of_weights(hub: Hub, config: dict[str, Any], said: str) -> None:
    hub.add(SINGLE_NAME)
    hub.add("config.json", text=json.dumps(config))
    with pytest.raises(ModelError, match=said):
        resolve_model("org/model")
    assert SINGLE_NAME not in hub.names


def test_a_repository_of_gguf_files_is_named_as_one(hub: Hub) -> None:
    (hub.repository / "config.json").unlink()
    with pytest.raises(
        ModelError, match=r"^org/model has no config\.json; download one of its GGUF files, such as model-q4"
    ):
        resolve_model("org/model")


def test_a_repository_of_pickles_is_named_as_one(hub: Hub) -> None:
    with pytest.raises(ModelError, match=r"^org/model holds its weights as pickle files"):
        resolve_model("org/model")


def test_without_the_hub_the_cache_is_all_there_is(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> list[str]:
        raise RuntimeError("no route\nto host")

    hub.add(SINGLE_NAME, "a.safetensors")
    monkeypatch.setattr(huggingface_hub, "list_repo_files", fail)
    with pytest.raises(ModelError, match=r"^org/model .*cannot be downloaded from the hub \(no route\)"):
        download("org/model", code=False)
    hub.add(INDEX_NAME, text=index("a.safetensors"))
    assert download("org/model", code=False) == hub.cache
    assert SINGLE_NAME not in hub.names


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
