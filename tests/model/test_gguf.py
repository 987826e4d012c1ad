"""GGUF files: read tensor by tensor to the bits that transformers' whole-model reading gives, in one part or several."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gguf_models
from gguf_models import ARCHITECTURES, model_of, write_gguf
from helpers import VOCABULARY, save_tiny
from thanos.checkpoint.gguf_checkpoint import GGUFCheckpoint, Piece
from thanos.checkpoint.gguf_files import quick_reader
from thanos.checkpoint.gguf_header import StoredTensor, read_headers
from thanos.cli import run
from thanos.errors import ModelError, ResourceError
from thanos.model.gguf_mapping import gguf_checkpoint
from thanos.model.loading import load_model
from thanos.model.opening import open_model
from thanos.model.source import resolve_model

gguf = pytest.importorskip("gguf")

KINDS = ("Q8_0", "Q4_0", "Q5_1", "F16", "BF16")


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")


def by_transformers(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


def state_of(checkpoint: Any, key_of: dict[str, str]) -> dict[str, Tensor]:
    return {name: checkpoint.read(key) for name, key in key_of.items()}


def fused(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stack the matrices of the experts as transformers does."""
    whole = {name: tensor for name, tensor in state.items() if ".experts." not in name}
    stems = dict.fromkeys(name.partition(".experts.")[0] for name in state if ".experts." in name)
    for stem in stems:
        count = len({name.split(".experts.")[1].split(".")[0] for name in state if name.startswith(f"{stem}.experts.")})
        parts = {
            part: torch.stack([state[f"{stem}.experts.{index}.{part}.weight"] for index in range(count)])
            for part in ("gate_proj", "up_proj", "down_proj")
        }
        whole[f"{stem}.experts.gate_up_proj"] = torch.cat([parts["gate_proj"], parts["up_proj"]], 1)
        whole[f"{stem}.experts.down_proj"] = parts["down_proj"]
    return whole


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "mixtral"])
def test_tensors_are_those_of_transformers_to_the_bit(tmp_path: Path, name: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", name, KINDS)
    opened = open_model(resolve_model(path))
    assert isinstance(opened.checkpoint, GGUFCheckpoint)
    whole = by_transformers(path)
    expected = {key: tensor for key, tensor in whole.state_dict().items() if key in dict(whole.named_parameters())}
    found = fused(state_of(opened.checkpoint, opened.key_of))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_exact_file_gives_the_model_that_was_written(tmp_path: Path, name: str) -> None:
    """The oracle is the model before it was a file: no reader of GGUF has a part in it."""
    path = write_gguf(tmp_path / "m.gguf", name, ("F32",))
    original, loaded = model_of(name), load_model(resolve_model(path))
    assert type(loaded) is (type(original) if name != "mistral" else type(model_of("llama")))
    state = loaded.state_dict()
    for key, tensor in original.state_dict().items():
        close = (
            torch.allclose(state[key], tensor, rtol=0, atol=1e-6) if "norm" in key else torch.equal(state[key], tensor)
        )
        assert close, key  # a norm of Gemma is written with 1 added
    ids = torch.arange(3, 35).view(2, 16) % VOCABULARY
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, original(ids).logits, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "tinyllama", "gemma-3", "qwen3-moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_is_that_of_transformers(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM

    path = write_gguf(tmp_path / "m.gguf", name, KINDS)
    loaded = load_model(resolve_model(path), dtype=dtype)
    whole: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    state = loaded.state_dict()
    assert state.keys() == whole.state_dict().keys()
    for key, tensor in whole.state_dict().items():
        assert state[key].dtype == tensor.dtype
        assert torch.equal(state[key], tensor), key
    ids = torch.arange(3, 35).view(2, 16)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, whole(ids).logits)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == whole.config.tie_word_embeddings
    loaded.save_pretrained(tmp_path / "saved")  # nothing of the format is left in its config
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(tensor, state[key]) for key, tensor in again.state_dict().items())


@pytest.mark.parametrize("name", ["qwen2", "mixtral"])
def test_several_parts_are_read_as_one(tmp_path: Path, name: str) -> None:
    whole = open_model(resolve_model(write_gguf(tmp_path / "whole.gguf", name, KINDS)))
    first = write_gguf(tmp_path / "m.gguf", name, KINDS, parts=3)
    assert first.name == "m-00001-of-00003.gguf"
    for part in sorted(tmp_path.glob("m-*.gguf")):  # any part stands for all
        source = resolve_model(part)
        assert source.gguf == first
        assert len(source.gguf_parts) == 3
    opened = open_model(resolve_model(first))
    assert opened.meta_model.config.tie_word_embeddings == whole.meta_model.config.tie_word_embeddings
    assert opened.checkpoint.layout == whole.checkpoint.layout
    for key in whole.checkpoint.tensors:
        assert torch.equal(opened.checkpoint.read(key), whole.checkpoint.read(key)), key
    assert load_model(resolve_model(first)).config.vocab_size == VOCABULARY


@pytest.mark.parametrize("where", range(3))
def test_the_head_may_be_in_any_part(tmp_path: Path, where: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = gguf_models._tensors

    def moved(*arguments: Any) -> dict[str, np.ndarray]:
        made = tensors(*arguments)
        head = made.pop("output.weight")
        items = list(made.items())
        return dict([*items[:where], ("output.weight", head), *items[where:]])

    monkeypatch.setattr(gguf_models, "_tensors", moved)
    source = resolve_model(write_gguf(tmp_path / "m.gguf", "llama", parts=3))
    assert source.config().tie_word_embeddings is False


@pytest.mark.parametrize("parts", [1, 2])
def test_the_ending_may_be_in_capitals(tmp_path: Path, parts: int) -> None:
    write_gguf(tmp_path / "m.gguf", "llama", parts=parts)
    opened = open_model(resolve_model(min(tmp_path.iterdir())))
    small = state_of(opened.checkpoint, opened.key_of)
    capitals = [path.rename(path.with_name(path.name.upper())) for path in sorted(tmp_path.iterdir())]
    for part in capitals:
        source = resolve_model(part)
        assert (source.gguf, source.gguf_parts) == (capitals[0], tuple(capitals))
    opened = open_model(source)
    capital = state_of(opened.checkpoint, opened.key_of)
    assert capital.keys() == small.keys()
    assert all(torch.equal(capital[name], small[name]) for name in small)
    with pytest.raises(
        ModelError, match=r"NONE\.GGUF does not exist; MODEL is a hub name, a local folder or a \.gguf file"
    ):
        resolve_model("NONE.GGUF")
    (tmp_path / "folder").mkdir()
    capitals[0].rename(tmp_path / "folder" / "M.GGUF")
    with pytest.raises(ModelError, match=r"has no config\.json; name the file itself, for example .*folder/M\.GGUF"):
        resolve_model(tmp_path / "folder")


@pytest.mark.parametrize("adapter", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_beside_a_file_is_not_applied_and_a_note_says_so(
    tmp_path: Path, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama")
    alone = open_model(resolve_model(path))
    (tmp_path / adapter).write_text('{"base_model_name_or_path": "another/model"}')
    beside = open_model(resolve_model(path))
    note = f"the adapter in the folder of m.gguf, {adapter}, is not applied: only the GGUF file is read"
    assert (alone.notes, beside.notes) == ([], [note])
    for key in alone.checkpoint.tensors:
        assert torch.equal(alone.checkpoint.read(key), beside.checkpoint.read(key)), key
    # transformers would apply it to a file that it has to load.
    monkeypatch.setattr("thanos.model.opening.gguf_checkpoint", lambda header, model: None)
    monkeypatch.setattr("thanos.model.loading.gguf_checkpoint", lambda header, model: None)
    for load in (open_model, load_model):
        with pytest.raises(
            ModelError, match=rf"the adapter in the same folder too, {adapter}; move the file into a folder of its"
        ):
            load(resolve_model(path))


def test_every_command_that_loads_a_file_names_the_adapter_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text_file: Path
) -> None:
    """The tokenizer of the file makes no difference here: what each command says before it reads a text."""
    path = write_gguf(tmp_path / "m.gguf", "llama")
    (tmp_path / "adapter_config.json").write_text("{}")
    note = "the adapter in the folder of m.gguf, adapter_config.json, is not applied: only the GGUF file is read"
    words = ["--text", str(text_file), "--sequence-length", "16", "--device", "cpu"]
    for arguments in (
        ["eval", str(path), *words],
        ["eval", str(save_tiny(tmp_path / "a")), "--dense", str(path), *words],
        ["bench", "decode", str(path), "--context", "4", "--new-tokens", "1", "--device", "cpu"],
    ):
        run(arguments)
        said = capsys.readouterr().err
        assert said.count(note) == 1, (arguments, said)


def test_a_missing_part(tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "m.gguf", "llama", parts=3)
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    with pytest.raises(ModelError, match=r"one of 3 parts of a GGUF file, but m-00002-of-00003\.gguf is missing"):
        resolve_model(first)


def test_other_architectures_are_loaded_whole_with_a_note(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "qwen2")
    whole = open_model(resolve_model(path)).checkpoint
    with pytest.MonkeyPatch.context() as patch:
        for module in ("gguf_mapping", "opening"):
            patch.setattr(f"thanos.model.{module}.BY_BLOCK", ("llama",))
        opened = open_model(resolve_model(path))
    assert opened.notes == [
        "transformers loads this GGUF file whole, in float32: files of the architecture qwen2 are not read block by block, "
        "only those of llama"
    ]
    for key in whole.tensors:
        assert torch.equal(opened.checkpoint.read(key), whole.read(key)), key


# --- the head -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1"])
def test_a_head_that_is_the_embedding_again(tmp_path: Path, kind: str) -> None:
    opened = open_model(resolve_model(write_gguf(tmp_path / "m.gguf", "tinyllama", ("Q4_0",), head=kind)))
    assert opened.notes == [
        f"the file stores the embedding twice, as Q4_0 and {kind}, the second time for the head: the two are not tied, so the "
        f"model has {32 * VOCABULARY:,} more parameters than with tied embeddings"
    ]
    assert "lm_head.weight" in opened.key_of


@pytest.mark.parametrize("name", ["llama", "tinyllama"])
def test_no_note_on_other_heads(tmp_path: Path, name: str) -> None:
    assert open_model(resolve_model(write_gguf(tmp_path / "m.gguf", name))).notes == []


# --- the format ---------------------------------------------------------------------------------------------------------


def random_blocks(kind: Any, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Rows of quantised blocks with random codes and scales."""
    entries, size = gguf.GGML_QUANT_SIZES[kind]
    draw = np.random.default_rng(seed)
    blocks = draw.integers(0, 256, (rows * columns // entries, size), np.uint8)
    scale = draw.uniform(0.001, 0.1, len(blocks)).astype(np.float16).view(np.uint8).reshape(-1, 2)
    at = {"Q6_K": (208,), "Q3_K": (108,), "Q2_K": (80, 82), "Q4_K": (0, 2), "Q5_K": (0, 2)}[kind.name]
    for start in at:
        blocks[:, start : start + 2] = scale
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
@pytest.mark.parametrize("columns", [256, 768])
def test_quantised_rows_are_dequantised_as_the_package_does(tmp_path: Path, kind: str, columns: int) -> None:
    number, rows = gguf.GGMLQuantizationType[kind], 37
    raw = random_blocks(number, rows, columns)
    (tmp_path / "m.gguf").write_bytes(bytes(13) + raw.tobytes())
    expected = torch.from_numpy(gguf.dequantize(raw, number))
    assert expected.isfinite().all()
    stored = StoredTensor(tmp_path / "m.gguf", 13, int(number), (rows, columns))
    order = np.random.default_rng(1).permutation(rows)
    pieces = {
        "plain": [Piece(stored, 0, rows)],
        "some": [Piece(stored, 4, 9)],
        "turned": [Piece(stored, 0, rows, order, 0.5)],
    }
    shapes = {name: (own[0].rows, columns) for name, own in pieces.items()}
    checkpoint = GGUFCheckpoint(pieces, shapes)
    values = {"plain": expected, "some": expected[4:13], "turned": expected[order] + 0.5}
    for name, tensor in values.items():
        assert torch.equal(checkpoint.read(name), tensor)
        for first, count in ((0, 1), (columns - 1, 3), (2 * columns + 5, columns), (tensor.numel() - 2, 2), (7, 0)):
            assert torch.equal(checkpoint.entries(name, first, count), tensor.reshape(-1)[first : first + count])
        assert b"".join(checkpoint.raw_spans(name)) == tensor.numpy().tobytes()


def test_chunks_are_whole_rows_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thanos.checkpoint.gguf_checkpoint._CHUNK_ENTRIES", 70)
    path = write_gguf(tmp_path / "m.gguf", "mixtral", KINDS)
    opened = open_model(resolve_model(path))
    for key, info in opened.checkpoint.tensors.items():
        chunks = list(opened.checkpoint.chunks(key))
        assert all(len(chunk) <= 70 for chunk in chunks)
        assert torch.equal(torch.cat(chunks).view(info.shape), opened.checkpoint.read(key))


def test_the_header_is_that_of_the_package(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "gemma-3", KINDS, metadata={"general.languages": ["en", "de"], "x.y": ["a"]})
    header, reader = read_headers([path]), gguf.GGUFReader(path)
    assert header.tensors.keys() == {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        own = header.tensors[tensor.name]
        assert (own.offset, own.kind, list(reversed(own.shape))) == (
            tensor.data_offset, int(tensor.tensor_type), tensor.shape.tolist(),
        )  # fmt: skip
    for key, value in header.metadata.items():
        assert reader.fields[key].contents() == value
    assert header.metadata["general.languages"] == ["en", "de"]
    assert "x.y" not in header.metadata


def test_the_quick_reader_reads_the_same_and_is_put_away(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "qwen2", KINDS)
    original, plain = gguf.GGUFReader, gguf.GGUFReader(path)
    with quick_reader():
        quick = gguf.GGUFReader(path)
    assert gguf.GGUFReader is original
    assert type(quick.data) is np.ndarray
    assert quick.fields.keys() == plain.fields.keys()
    assert all(quick.fields[key].contents() == field.contents() for key, field in plain.fields.items())
    for one, other in zip(quick.tensors, plain.tensors, strict=True):
        assert one.name == other.name
        assert np.array_equal(one.data, other.data)
    with pytest.raises(RuntimeError, match="inside"), quick_reader():
        raise RuntimeError("inside")
    assert gguf.GGUFReader is original


def word(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def value(name: str, kind: int, data: bytes) -> bytes:
    return word(name) + struct.pack("<I", kind) + data


def stored(name: str, sizes: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return word(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


STATED = value("general.architecture", 8, word("llama"))

ARRAYS = struct.pack("<IQ", 9, 1) * 5000 + struct.pack("<IQ", 0, 0)
"""5000 arrays, each in the one before."""


@pytest.mark.parametrize(
    ("values", "tensors"),
    [
        ([value("general.x", 9, ARRAYS)], []),
        ([value("x.y", 9, ARRAYS)], []),
        ([value("general.alignment", 4, struct.pack("<I", 0))], []),
        ([value("general.alignment", 8, word("32"))], []),
        ([value("general.x", 13, b"")], []),
        ([value("x.y", 9, struct.pack("<IQ", 0, 1 << 60))], []),
        ([], [stored("a", (4,)), stored("a", (4,))]),
        ([], [stored("a", (0, 4))]),
        ([], [stored("a", ())]),
        ([], [stored("a", (1,) * 5)]),
        ([], [stored("a", (33, 4), 8)]),
        ([], [stored("a", (4,), 999)]),
        ([], [stored("a", (1 << 63, 1 << 63))]),
        ([], [stored("a", (4,), 0, 1 << 63)]),
        ([], [word("a") + struct.pack("<I", 1 << 31) + bytes(4000)]),
    ],
)
def test_a_header_that_makes_no_sense(
    tmp_path: Path, values: list[bytes], tensors: list[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    path, values = tmp_path / "m.gguf", [STATED, *values]
    counts = struct.pack("<IQQ", 3, len(tensors), len(values))
    path.write_bytes(b"GGUF" + counts + b"".join(values + tensors) + bytes(4096))
    with pytest.raises(ModelError, match="truncated or corrupt: download it again"):
        read_headers([path])
    assert run(["prune", str(path), str(tmp_path / "out"), "--quiet"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert [found.name for found in tmp_path.iterdir()] == ["m.gguf"]


def with_number(path: Path, key: str, number: int) -> Path:
    """Overwrite a 32-bit number of the metadata in place."""
    raw, name = bytearray(path.read_bytes()), word(key)
    at = raw.index(name) + len(name)
    assert struct.unpack_from("<I", raw, at) == (4,)
    struct.pack_into("<I", raw, at + 4, number)
    path.write_bytes(raw)
    return path


def test_more_blocks_than_tensors(tmp_path: Path) -> None:
    path = with_number(write_gguf(tmp_path / "m.gguf", "llama"), "llama.block_count", 4_000_000_000)
    with pytest.raises(ModelError, match="states 4,000,000,000 blocks and holds 30 tensors"):
        resolve_model(path)


def test_a_kind_that_the_package_cannot_read(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", ("F32",))
    raw, name = bytearray(path.read_bytes()), word("output_norm.weight")
    at = raw.index(name) + len(name)
    (count,) = struct.unpack_from("<I", raw, at)
    struct.pack_into("<I", raw, at + 4 + 8 * count, int(gguf.GGMLQuantizationType.I32))
    path.write_bytes(raw)
    for load in (open_model, load_model):
        with pytest.raises(ModelError, match="the kind I32, which the gguf package cannot read"):
            load(resolve_model(path))


def test_rows_that_do_not_divide_into_heads_are_left_to_transformers(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", metadata={"llama.attention.head_count": 1000})
    source = resolve_model(write_gguf(tmp_path / "whole.gguf", "llama"))
    assert gguf_checkpoint(source.gguf_header, open_model(source).meta_model) is not None
    assert gguf_checkpoint(read_headers([path]), open_model(source).meta_model) is None


def test_a_file_of_a_known_architecture_that_transformers_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = resolve_model(write_gguf(tmp_path / "m.gguf", "llama"))
    monkeypatch.setattr("thanos.model.opening.gguf_checkpoint", lambda header, model: None)
    monkeypatch.setattr("thanos.model.loading.gguf_checkpoint", lambda header, model: None)
    assert open_model(source).notes == [
        "transformers loads this GGUF file whole, in float32: its tensors do not match the model's parameters one to one"
    ]


@pytest.mark.parametrize("cut", [5, 23, 24, 60, 300, 4000, -33])
def test_a_truncated_header(tmp_path: Path, cut: int) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ModelError, match="truncated or corrupt: download it again"):
        read_headers([path])


def test_a_file_that_becomes_shorter(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama")
    opened = open_model(resolve_model(path))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ResourceError, match="became shorter"):
        state_of(opened.checkpoint, opened.key_of)
