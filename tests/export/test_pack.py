"""Packing a checkpoint and getting it back."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import save_tiny
from sparse_matrices import files_of, save_pruned
from thanos.errors import ModelError, UserError
from thanos.export.pack import pack
from thanos.export.unpack import unpack
from thanos.run.lock import locked
from thanos.sparse import encoding, formats
from thanos.sparse.encoding import encode_strips


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pruned(tmp_path_factory.mktemp("pruned") / "model", max_shard_size="40KB")


@pytest.fixture(scope="module")
def packed(pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "packed"
    pack(pruned, out, least_weights=1)
    return out


@pytest.mark.parametrize(
    "architecture", ["llama", "tinyllama", "opt-350m", "qwen2", "gemma-3", "phi-3", "gpt-neox", "mixtral"]
)
def test_unpack_gives_the_same_files(architecture, tmp_path):
    source = save_pruned(tmp_path / "model", architecture, dtype=torch.float16, max_shard_size="30KB")
    (source / "pruning.json").write_text('{"any": 1}')
    (source / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    before = files_of(source)
    report = pack(source, tmp_path / "packed", least_weights=1)
    assert any(layer.format for layer in report.layers)
    unpack(tmp_path / "packed", tmp_path / "again")
    assert files_of(tmp_path / "again") == before == files_of(source)
    assert (tmp_path / "packed" / "pruning.json").read_text() == '{"any": 1}'
    assert "import thanos.sparse" in (tmp_path / "packed" / "README.md").read_text()


def test_every_linear_layer_is_packed_or_has_a_reason(tmp_path):
    source = save_pruned(tmp_path / "model", "mixtral")
    report = pack(source, tmp_path / "packed", least_weights=1024)
    reasons = {layer.name: layer.reason for layer in report.layers if not layer.format}
    assert all(layer.format or layer.reason for layer in report.layers)
    assert reasons["lm_head"].startswith("too dense")
    assert any(reason.startswith("an expert: ") for reason in reasons.values())
    written = load_file(tmp_path / "packed" / "model.safetensors")
    for layer in report.layers:
        assert (f"{layer.name}.weight_words" in written) == bool(layer.format)
    assert report.nbytes == sum(t.numel() * t.element_size() for t in written.values())


def test_small_tied_and_wide_layers_stay_dense(tmp_path):
    source = save_pruned(tmp_path / "model", "tinyllama")
    report = pack(source, tmp_path / "packed", least_weights=2048)
    reasons = {layer.name: layer.reason for layer in report.layers if not layer.format}
    assert reasons["lm_head"] == "shares its weight with the input embedding"
    assert reasons["model.layers.0.self_attn.q_proj"] == "too small: fewer than 2,048 weights"
    assert {layer.n for layer in report.layers if layer.name == "model.layers.0.mlp.up_proj"} == {16}


def test_negative_zeros_are_named_as_the_reason(pruned, tmp_path):
    source = shutil.copytree(save_pruned(tmp_path / "one"), tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = torch.where(tensors[name] == 0, -torch.zeros_like(tensors[name]), tensors[name])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    report = pack(source, tmp_path / "packed", least_weights=1)
    assert "1,024 zeros are negative" in next(layer.reason for layer in report.layers if f"{layer.name}.weight" == name)


def test_a_saved_model_without_its_record_gives_the_same_tensors(pruned, packed, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "packed")
    (folder / "packing.json").unlink()
    assert unpack(folder, tmp_path / "again") is None
    expected: dict[str, Any] = {}
    for path in pruned.glob("*.safetensors"):
        expected |= load_file(path)
    got = load_file(tmp_path / "again" / "model.safetensors")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name].view(torch.int16), expected[name].view(torch.int16)) for name in got)
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_the_same_input_gives_the_same_bytes(pruned, packed, tmp_path):
    pack(pruned, tmp_path / "second", least_weights=1)
    assert files_of(tmp_path / "second") == files_of(packed)


@pytest.mark.parametrize("entries", [1, 2048, 1 << 23])
def test_layers_are_packed_and_unpacked_in_parts_one_after_another(pruned, packed, tmp_path, monkeypatch, entries):
    """Whatever the size of the parts, the files are the same, and one part is in memory: its rows and its words."""
    alive: list[weakref.ref[Any]] = []
    largest: list[int] = []

    def encode(rows: torch.Tensor, *others: Any) -> torch.Tensor:
        assert all(one() is None for one in alive)
        words = encode_strips(rows, *others)
        alive.extend((weakref.ref(rows), weakref.ref(words)))
        largest.append(rows.numel())
        return words

    monkeypatch.setattr(formats, "_PART_ENTRIES", entries)
    monkeypatch.setattr("thanos.export.pack.encode_strips", encode)
    pack(pruned, tmp_path / "packed", least_weights=1)
    assert max(largest) <= max(entries, 32 * 64)  # a strip at least; the layers are 64 wide
    assert files_of(tmp_path / "packed") == files_of(packed)
    unpack(tmp_path / "packed", tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(pruned)


def test_a_layer_without_a_format_that_holds_it_stays_dense_with_a_reason(tmp_path, monkeypatch):
    source = save_pruned(tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors[f"{BITMAP}.weight"][0] = 1  # full rows: no fixed format
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(encoding, "MOST_UNITS", 1)
    report = pack(source, tmp_path / "packed", least_weights=1)
    [layer] = [one for one in report.layers if one.name == BITMAP]
    assert (layer.format, layer.reason) == ("", "too large: the bitmap format holds 32 GiB at most")


def test_shards_have_the_size_that_is_asked_for(pruned, tmp_path):
    pack(pruned, tmp_path / "packed", least_weights=1, max_shard_bytes=30_000)
    shards = sorted((tmp_path / "packed").glob("*.safetensors"))
    assert len(shards) > 2
    assert all(path.stat().st_size < 40_000 for path in shards)
    unpack(tmp_path / "packed", tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(pruned)


def test_refusals_say_what_to_do(pruned, packed, tmp_path):
    for call, words in (
        (lambda: pack(save_tiny(tmp_path / "dense"), tmp_path / "o"), "prune it first"),
        (lambda: pack(packed, tmp_path / "o"), "packed"),
        (lambda: pack(pruned, pruned), "own folder"),
        (lambda: pack(pruned, packed), "--overwrite"),
        (lambda: pack(pruned, tmp_path / "o", least_weights=0), "at least 1"),
        (lambda: unpack(pruned, tmp_path / "o"), "is not packed"),
        (lambda: unpack(tmp_path, tmp_path / "o"), "not a folder with a config.json"),
        (lambda: unpack(packed, packed), "own folder"),
    ):
        with pytest.raises(UserError, match=words):
            call()
    assert not (tmp_path / "o").exists()
    assert not list(tmp_path.glob(".*"))


def test_layers_of_two_dtypes_are_refused(tmp_path):
    source = save_pruned(tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].half()}, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers of torch\.bfloat16 and torch\.float16; a model runs in one dtype"):
        pack(source, tmp_path / "packed", least_weights=1)
    assert not (tmp_path / "packed").exists()


def test_an_output_is_replaced_only_when_asked(pruned, packed, tmp_path):
    out = shutil.copytree(pruned, tmp_path / "out")
    pack(pruned, out, least_weights=1, overwrite=True)
    assert files_of(out) == files_of(packed)


def test_only_one_run_writes_a_folder(pruned, tmp_path):
    with locked(tmp_path / "out"), pytest.raises(UserError, match="is being written by"):
        pack(pruned, tmp_path / "out", least_weights=1)


def test_nothing_is_left_after_a_failure(pruned, tmp_path, monkeypatch):
    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    monkeypatch.setattr("thanos.export.pack.copy_others", fail)
    with pytest.raises(RuntimeError):
        pack(pruned, tmp_path / "out", least_weights=1)
    assert list(tmp_path.iterdir()) == []


def damaged(packed: Path, target: Path, change: Any) -> Path:
    """A copy of the packed folder whose tensors and config were changed by a function."""
    folder = shutil.copytree(packed, target)
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


FIXED, BITMAP = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"


def set_entry(layer: str, key: str, value: Any) -> Any:
    return lambda tensors, settings: settings["layers"][layer].__setitem__(key, value)


def set_item(name: str, index: int, value: int) -> Any:
    return lambda tensors, settings: tensors[name].__setitem__(index, value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors, settings: settings.__setitem__("format_version", 3), "version 3"),
        (lambda tensors, settings: settings.__setitem__("layers", {}), "no packed layers"),
        (lambda tensors, settings: settings["layers"].pop(FIXED), "lists no packed layer"),
        (lambda tensors, settings: settings["layers"].__setitem__("x", settings["layers"][FIXED]), "has no tensor"),
        (lambda tensors, settings: tensors.pop(f"{FIXED}.weight_words"), "has no tensor"),
        (lambda tensors, settings: tensors.pop(f"{BITMAP}.weight_offsets"), "is missing"),
        (set_entry(FIXED, "n", 15), "config.json asks for"),
        (set_entry(FIXED, "n", 32), "n = 32"),
        (set_entry(FIXED, "n", True), "n = True"),
        (set_entry(FIXED, "shape", [65, 64]), "config.json asks for"),
        (set_entry(FIXED, "shape", [0, 64]), "the shape"),
        (set_entry(FIXED, "shape", [64, 2**40]), "the shape"),
        (set_entry(FIXED, "shape", [64, -32]), "the shape"),
        (set_entry(FIXED, "dtype", "float32"), "the dtype"),
        (set_entry(FIXED, "format", "dense"), "the format"),
        (set_entry(BITMAP, "words", 10**12), "words"),
        (set_item(f"{FIXED}.weight_words", 5, -1), "mask"),
        (set_item(f"{FIXED}.weight_words", 5, 0), "mask"),
        (set_item(f"{BITMAP}.weight_words", 31, 0x7FFFFFFF), "mask"),
        (set_item(f"{BITMAP}.weight_offsets", 0, 4), "offsets"),
        (set_item(f"{BITMAP}.weight_offsets", 1, 2**31 - 1), "offsets"),
        (set_item(f"{BITMAP}.weight_offsets", 1, -(2**31)), "offsets"),
        (set_item(f"{BITMAP}.weight_offsets", 2, 0), "offsets"),
    ],
)
def test_a_damaged_or_hostile_folder_is_refused(packed, tmp_path, change, words):
    folder = damaged(packed, tmp_path / "bad", change)
    with pytest.raises(ModelError, match=words):
        unpack(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_entries_beyond_the_matrix_are_refused(tmp_path):
    source = save_pruned(
        tmp_path / "model", hidden_size=40, intermediate_size=72, num_attention_heads=5, num_key_value_heads=5
    )
    pack(source, tmp_path / "packed", least_weights=1)

    def change(tensors: Any, settings: Any) -> None:
        begin, end = tensors[f"{BITMAP}.weight_offsets"][4:6].tolist()  # 72 × 40: the last strip's first tile
        first, n = 16 * (begin // 4) + 32, end // 4 - begin // 4 - 2 - begin % 4
        assert n > 0
        tensors[f"{BITMAP}.weight_words"][first : first + 16 * n] = 0x3F803F80  # ones in all rows

    unpack(tmp_path / "packed", tmp_path / "fine")
    assert files_of(tmp_path / "fine") == files_of(source)
    with pytest.raises(ModelError, match="beyond its last row"):
        unpack(damaged(tmp_path / "packed", tmp_path / "bad", change), tmp_path / "out")


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.__setitem__("schema", 9),
        lambda v: v.pop("dense"),
        lambda v: v["dense"]["shards"][0].__setitem__("name", "../evil.safetensors"),
        lambda v: v["dense"]["shards"][0].__setitem__("name", "config.json"),
        lambda v: v["dense"]["shards"][0].__setitem__("header", "!"),
        lambda v: v["dense"]["shards"][0].__setitem__("header", "AAAAAAAAAAA="),
        lambda v: v["dense"]["shards"].append(v["dense"]["shards"][0]),
        lambda v: v["dense"].__setitem__("shards", v["dense"]["shards"][:1]),
        lambda v: v["dense"].__setitem__("index", v["dense"]["shards"][0]["header"]),
        lambda v: v["dense"]["files"].__setitem__("config.json", None),
    ],
)
def test_a_damaged_record_is_refused(packed, tmp_path, change):
    folder = shutil.copytree(packed, tmp_path / "bad")
    values = json.loads((folder / "packing.json").read_text())
    change(values)
    (folder / "packing.json").write_text(json.dumps(values))
    with pytest.raises(ModelError):
        unpack(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*evil*"))


def test_a_truncated_file_is_refused(packed, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "bad")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ModelError, match="truncated"):
        unpack(folder, tmp_path / "out")
