"""Reading safetensors by hand agrees with the safetensors library, and every damaged file is refused by name."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from helpers import save_tiny
from thanos.checkpoint.in_memory import LoadedCheckpoint
from thanos.checkpoint.reader import SafetensorsCheckpoint
from thanos.checkpoint.weight_files import INDEX_NAME, SINGLE_NAME
from thanos.checkpoint.writer import CheckpointWriter
from thanos.errors import ModelError
from thanos.model.names import match_parameters

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


def sample(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool((a.contiguous().reshape(-1).view(torch.uint8) == b.contiguous().reshape(-1).view(torch.uint8)).all())


def raw_file(path: Path, header: dict[str, Any] | bytes, data: bytes, *, length: int | None = None) -> Path:
    """Write a safetensors file from its parts, whether or not they fit together."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(first: int, last: int, shape: list[Any], dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_read_equals_the_library_for_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {"matrix": sample(dtype, (5, 7)), "vector": sample(dtype, (3,), 1), "cube": sample(dtype, (2, 3, 4), 2)}
    save_file(state, tmp_path / SINGLE_NAME)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    reference = load_file(tmp_path / SINGLE_NAME)
    assert set(checkpoint.tensors) == set(reference)
    assert checkpoint.layout.index is None
    for name, tensor in reference.items():
        assert same(checkpoint.read(name), tensor)
        assert same(checkpoint.read(name), state[name])
        info = checkpoint.tensors[name]
        assert (info.dtype, info.shape, info.numel) == (tensor.dtype, tuple(tensor.shape), tensor.numel())
        assert info.nbytes == tensor.numel() * tensor.element_size()


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    state = {
        "scalar": torch.tensor(2.5),
        "half": torch.tensor(1.5, dtype=torch.float16),
        "empty": torch.empty(0),
        "flat": torch.empty(4, 0, 3, dtype=torch.bfloat16),
        "full": torch.arange(6.0),
    }
    save_file(state, tmp_path / SINGLE_NAME)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    for name, tensor in state.items():
        assert same(checkpoint.read(name), tensor), name


def test_read_gives_memory_of_its_own(tmp_path: Path) -> None:
    save_file({"w": torch.arange(6.0)}, tmp_path / SINGLE_NAME)
    before = (tmp_path / SINGLE_NAME).read_bytes()
    checkpoint = SafetensorsCheckpoint(tmp_path)
    checkpoint.read("w").zero_()
    assert checkpoint.read("w").tolist() == [0, 1, 2, 3, 4, 5]
    assert (tmp_path / SINGLE_NAME).read_bytes() == before


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
        min_size=1,
        max_size=6,
    )
)
def test_any_state_reads_as_the_library_wrote_it(
    tmp_path_factory: pytest.TempPathFactory, layout: dict[str, tuple[torch.dtype, list[int]]]
) -> None:
    folder = tmp_path_factory.mktemp("state")
    state = {name: sample(dtype, tuple(shape), i) for i, (name, (dtype, shape)) in enumerate(layout.items())}
    save_file(state, folder / SINGLE_NAME)
    checkpoint = SafetensorsCheckpoint(folder)
    assert set(checkpoint.tensors) == set(state)
    assert all(same(checkpoint.read(name), tensor) for name, tensor in state.items())
    # The same tensors planned by ourselves: the library reads what the layout says.
    loaded = LoadedCheckpoint(state)
    (shard,) = loaded.layout.shards
    data = bytearray(shard.header + bytes(shard.size - len(shard.header)))
    for name, info in loaded.tensors.items():
        data[info.offset : info.offset + info.nbytes] = raw_bytes(state[name])
    read = load(bytes(data))
    assert set(read) == set(state)
    assert all(same(read[name], tensor) for name, tensor in state.items())


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_sharded_model_reads_as_the_library_does(tmp_path: Path) -> None:
    save_tiny(tmp_path, max_shard_size="40KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2, "the fixture must be sharded"
    checkpoint = SafetensorsCheckpoint(tmp_path)
    index = json.loads((tmp_path / INDEX_NAME).read_text())["weight_map"]
    assert checkpoint.layout.index == (tmp_path / INDEX_NAME).read_bytes()
    assert [shard.name for shard in checkpoint.layout.shards] == list(dict.fromkeys(index.values()))
    assert {name: info.shard for name, info in checkpoint.tensors.items()} == index
    for file in files:
        layout = next(shard for shard in checkpoint.layout.shards if shard.name == file.name)
        assert layout.size == file.stat().st_size
        assert file.read_bytes().startswith(layout.header)
        for name, tensor in load_file(file).items():
            assert same(checkpoint.read(name), tensor)


def test_metadata_in_the_header_is_no_tensor(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / SINGLE_NAME, metadata={"format": "pt", "note": "ä"})
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert list(checkpoint.tensors) == ["w"]
    assert "ä".encode() in checkpoint.layout.shards[0].header or b"\\u00e4" in checkpoint.layout.shards[0].header


def test_tensors_written_out_of_order_in_the_header(tmp_path: Path) -> None:
    raw_file(tmp_path / SINGLE_NAME, {"b": entry(2, 3, [1]), "a": entry(0, 2, [2])}, b"\x01\x02\x03")
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert checkpoint.read("a").tolist() == [1, 2]
    assert checkpoint.read("b").tolist() == [3]


def test_unaligned_offsets_are_read(tmp_path: Path) -> None:
    """The format does not ask for alignment: an odd number of bytes before a float is valid."""
    header = {"a": entry(0, 1, [1]), "b": entry(1, 9, [2], "F32")}
    raw_file(tmp_path / SINGLE_NAME, header, b"\x07" + struct.pack("<2f", 1.5, -2.0))
    assert SafetensorsCheckpoint(tmp_path).read("b").tolist() == [1.5, -2.0]


@pytest.mark.parametrize(("dtype", "size"), [("F8_E8M0", 1), ("F4", 1)])
def test_a_dtype_that_is_not_supported_is_no_damage(tmp_path: Path, dtype: str, size: int) -> None:
    header = {"a": entry(0, 1, [1]), "scales": entry(1, 1 + 3 * size, [3], dtype)}
    raw_file(tmp_path / SINGLE_NAME, header, bytes(1 + 3 * size))
    with pytest.raises(
        ModelError, match=f"tensor scales is {dtype}, which is not supported.* before quantisation"
    ) as caught:
        SafetensorsCheckpoint(tmp_path)
    assert "corrupt" not in str(caught.value)


def test_chunks_are_the_tensors_entries_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a": torch.randn(7, 5), "b": torch.arange(23).to(torch.bfloat16), "none": torch.empty(0, 3)}
    save_file(tensors, tmp_path / SINGLE_NAME)
    monkeypatch.setattr("thanos.checkpoint.reader.CHUNK_ENTRIES", 4)
    monkeypatch.setattr("thanos.checkpoint.in_memory.CHUNK_ENTRIES", 4)
    for checkpoint in (SafetensorsCheckpoint(tmp_path), LoadedCheckpoint(tensors)):
        for name, tensor in tensors.items():
            chunks = list(checkpoint.chunks(name))
            assert all(0 < chunk.numel() <= 4 for chunk in chunks if tensor.numel())
            assert same(torch.cat([*chunks, tensor.reshape(-1)[:0]]), tensor.reshape(-1))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc")
def test_reading_a_large_tensor_leaves_nothing_in_memory(tmp_path: Path) -> None:
    from thanos.system.memory import host_bytes, host_peak_bytes, reset_host_peak

    size = 256 << 20
    file = raw_file(tmp_path / SINGLE_NAME, {"w": entry(0, size, [size])}, b"")
    os.truncate(file, file.stat().st_size + size)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    before = host_bytes()
    reset_host_peak()
    if host_peak_bytes() > before + size // 8:
        pytest.skip("the system does not let a process reset its peak")
    assert all(int(chunk.max()) == 0 for chunk in checkpoint.chunks("w"))
    assert host_peak_bytes() < before + size // 2
    assert int(checkpoint.read("w").max()) == 0
    assert host_bytes() < before + size // 8


def test_a_file_that_shrinks_after_it_was_checked(tmp_path: Path) -> None:
    save_file({"w": torch.arange(1000.0)}, tmp_path / SINGLE_NAME)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    with (tmp_path / SINGLE_NAME).open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(ModelError, match=r"model\.safetensors ends in the middle"):
        checkpoint.read("w")


# --- damage -----------------------------------------------------------------------------------------------------------

_GOOD = {"a": entry(0, 2, [2]), "b": entry(2, 6, [4])}
_DATA = bytes(range(6))

DAMAGE: dict[str, Callable[[Path], Any]] = {
    "empty file": lambda p: p.write_bytes(b""),
    "seven bytes": lambda p: p.write_bytes(b"\x01" * 7),
    "only a length": lambda p: p.write_bytes(struct.pack("<Q", 20)),
    "cut inside the header": lambda p: p.write_bytes(raw_file(p, _GOOD, _DATA).read_bytes()[:30]),
    "cut inside the tensors": lambda p: p.write_bytes(raw_file(p, _GOOD, _DATA).read_bytes()[:-1]),
    "no tensor bytes": lambda p: raw_file(p, _GOOD, b""),
    "too long": lambda p: raw_file(p, _GOOD, _DATA + b"\x00"),
    "huge header length": lambda p: raw_file(p, _GOOD, _DATA, length=2**63),
    "all ones length": lambda p: raw_file(p, _GOOD, _DATA, length=2**64 - 1),
    "header longer than the file": lambda p: raw_file(p, _GOOD, _DATA, length=10_000),
    "header length zero": lambda p: raw_file(p, _GOOD, _DATA, length=0),
    "header not JSON": lambda p: raw_file(p, b"{not json}", _DATA),
    "header not UTF-8": lambda p: raw_file(p, b'{"\xff\xfe": 1}', _DATA),
    "header a list": lambda p: raw_file(p, b"[1, 2]", _DATA),
    "header null": lambda p: raw_file(p, b"null", _DATA),
    "entry not an object": lambda p: raw_file(p, {"a": 3}, _DATA),
    "entry without offsets": lambda p: raw_file(p, {"a": {"dtype": "U8", "shape": [6]}}, _DATA),
    "entry without dtype": lambda p: raw_file(p, {"a": {"shape": [6], "data_offsets": [0, 6]}}, _DATA),
    "one offset": lambda p: raw_file(p, {"a": {"dtype": "U8", "shape": [6], "data_offsets": [0]}}, _DATA),
    "offsets as text": lambda p: raw_file(p, {"a": {"dtype": "U8", "shape": [6], "data_offsets": ["0", "6"]}}, _DATA),
    "fractional offsets": lambda p: raw_file(
        p, {"a": {"dtype": "U8", "shape": [6], "data_offsets": [0.0, 6.0]}}, _DATA
    ),
    "shape as text": lambda p: raw_file(p, {"a": entry(0, 6, ["six"])}, _DATA),
    "fractional shape": lambda p: raw_file(p, {"a": entry(0, 6, [6.5])}, _DATA),
    "infinite shape": lambda p: raw_file(p, b'{"a":{"dtype":"U8","shape":[1e999],"data_offsets":[0,6]}}', _DATA),
    "header nested too deeply": lambda p: raw_file(p, b'{"a":' + b"[" * 200_000, _DATA),
    "shape null": lambda p: raw_file(p, {"a": {"dtype": "U8", "shape": None, "data_offsets": [0, 6]}}, _DATA),
    "negative shape": lambda p: raw_file(p, {"a": entry(0, 6, [-2, -3])}, _DATA),
    "shape too small": lambda p: raw_file(p, {"a": entry(0, 6, [5])}, _DATA),
    "dtype too wide": lambda p: raw_file(p, {"a": entry(0, 6, [6], "F32")}, _DATA),
    "unknown dtype": lambda p: raw_file(p, {"a": entry(0, 6, [6], "X8")}, _DATA),
    "dtype a list": lambda p: raw_file(p, {"a": {"dtype": ["U8"], "shape": [6], "data_offsets": [0, 6]}}, _DATA),
    "gap between tensors": lambda p: raw_file(p, {"a": entry(0, 2, [2]), "b": entry(3, 6, [3])}, _DATA),
    "gap at the start": lambda p: raw_file(p, {"a": entry(1, 6, [5])}, _DATA),
    "overlap": lambda p: raw_file(p, {"a": entry(0, 4, [4]), "b": entry(2, 6, [4])}, _DATA),
    "same place twice": lambda p: raw_file(p, {"a": entry(0, 6, [6]), "b": entry(0, 6, [6])}, _DATA),
    "negative offset": lambda p: raw_file(p, {"a": entry(-2, 4, [6])}, _DATA),
    "offsets backwards": lambda p: raw_file(p, {"a": entry(6, 0, [6])}, _DATA),
    "beyond the end": lambda p: raw_file(p, {"a": entry(0, 6, [6]), "b": entry(6, 8, [2])}, _DATA),
    "not safetensors": lambda p: p.write_bytes(b"PK\x03\x04" * 64),
    "a text pointer": lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 5\n"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_with_the_files_name(tmp_path: Path, damage: str) -> None:
    path = tmp_path / SINGLE_NAME
    DAMAGE[damage](path)
    with pytest.raises(ModelError, match=re.escape(str(path))) as caught:
        SafetensorsCheckpoint(tmp_path)
    assert "\n" not in str(caught.value)
    assert "again" in str(caught.value), "says what to do"


def test_the_undamaged_file_of_these_tests_is_read(tmp_path: Path) -> None:
    raw_file(tmp_path / SINGLE_NAME, _GOOD, _DATA)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert checkpoint.read("a").tolist() == [0, 1]
    assert checkpoint.read("b").tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("cut inside the tensors", "truncated.*bytes"),
        ("too long", "too long.*bytes"),
        ("gap between tensors", "gap or overlap at b"),
        ("overlap", "gap or overlap at b"),
        ("unknown dtype", "X8"),
    ],
)
def test_damage_is_described(tmp_path: Path, damage: str, says: str) -> None:
    DAMAGE[damage](tmp_path / SINGLE_NAME)
    with pytest.raises(ModelError, match=says):
        SafetensorsCheckpoint(tmp_path)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=80), st.integers(0, 200))
def test_random_bytes_never_give_another_error(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes, length: int
) -> None:
    folder = tmp_path_factory.mktemp("junk")
    (folder / SINGLE_NAME).write_bytes(struct.pack("<Q", length) + junk)
    says = ""
    try:
        SafetensorsCheckpoint(folder)
    except ModelError as error:
        says = str(error)
    assert not says or SINGLE_NAME in says


def test_truncation_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / SINGLE_NAME
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2)}, path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=SINGLE_NAME):
            SafetensorsCheckpoint(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=rf"{re.escape(str(tmp_path))} has no weights: neither {SINGLE_NAME} nor {INDEX_NAME}"
    ):
        SafetensorsCheckpoint(tmp_path)


# --- index ------------------------------------------------------------------------------------------------------------


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_index_naming_a_missing_shard(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    with pytest.raises(ModelError, match=r"two\.safetensors is missing.*index"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "sub/in.safetensors", "/absolute.safetensors", "..", ".", "", 3, None]
)
def test_index_naming_a_path_outside_the_folder(tmp_path: Path, shard: Any) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "outside.safetensors")
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    save_file({"a": torch.ones(2)}, folder / "sub" / "in.safetensors")
    write_index(folder, {"a": shard})
    with pytest.raises(ModelError, match=re.escape(str(folder))):
        SafetensorsCheckpoint(folder)


def test_index_naming_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "ghost": "one.safetensors"})
    with pytest.raises(ModelError, match=rf"{INDEX_NAME} says that ghost is in one\.safetensors"):
        SafetensorsCheckpoint(tmp_path)


def test_index_naming_the_wrong_shard(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "two.safetensors", "b": "one.safetensors"})
    with pytest.raises(
        ModelError, match=rf"{INDEX_NAME} says that a is in two.safetensors, but it is in one.safetensors; correct"
    ):
        SafetensorsCheckpoint(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "c": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(2), "c": torch.ones(2)}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors", "c": "one.safetensors"})
    with pytest.raises(ModelError, match=r"tensor c is in both one\.safetensors and two\.safetensors"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', "\xff"])
def test_an_invalid_index(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX_NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=rf"{INDEX_NAME} is not a valid"):
        SafetensorsCheckpoint(tmp_path)


# --- checkpoints in memory --------------------------------------------------------------------------------------------


def materialise(checkpoint: LoadedCheckpoint, folder: Path) -> None:
    """Write a planned layout with plain file operations, tensors taken from the checkpoint."""
    for shard in checkpoint.layout.shards:
        data = bytearray(shard.size)
        data[: len(shard.header)] = shard.header
        for name, info in checkpoint.tensors.items():
            if info.shard == shard.name:
                data[info.offset : info.offset + info.nbytes] = raw_bytes(checkpoint.read(name))
        assert len(data) == shard.size
        (folder / shard.name).write_bytes(data)
    if checkpoint.layout.index is not None:
        (folder / INDEX_NAME).write_bytes(checkpoint.layout.index)


def test_planned_layout_equals_the_librarys_own_file(tmp_path: Path) -> None:
    state = {"z": sample(torch.float32, (3, 5)), "a": sample(torch.bfloat16, (3,)), "m": sample(torch.float32, (2,))}
    materialise(LoadedCheckpoint(state), tmp_path)
    save_file(state, tmp_path / "reference.safetensors", metadata={"format": "pt"})
    assert (tmp_path / SINGLE_NAME).read_bytes() == (tmp_path / "reference.safetensors").read_bytes()
    with safe_open(tmp_path / SINGLE_NAME, "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers asks for it


@pytest.mark.parametrize("limit", [1, 60, 200, 10**9])
def test_planned_shards_are_valid(tmp_path: Path, limit: int) -> None:
    state = {f"layer.{i}": sample(DTYPES[i % len(DTYPES)], (i, 3), i) for i in range(14)}
    checkpoint = LoadedCheckpoint(state, max_shard_bytes=limit)
    materialise(checkpoint, tmp_path)
    together: dict[str, torch.Tensor] = {}
    for shard in checkpoint.layout.shards:
        part = load_file(tmp_path / shard.name)
        assert not set(part) & set(together)
        assert len(part) == 1 or sum(t.nbytes for t in part.values()) <= limit
        together |= part
    assert set(together) == set(state)
    assert all(same(together[name], tensor) for name, tensor in state.items())
    if len(checkpoint.layout.shards) > 1:
        assert checkpoint.layout.index is not None
        index = json.loads(checkpoint.layout.index)
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
        assert index["weight_map"] == {name: info.shard for name, info in checkpoint.tensors.items()}
        count = len(checkpoint.layout.shards)
        assert [s.name for s in checkpoint.layout.shards] == [
            f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
        ]
    else:
        assert checkpoint.layout.index is None
        assert [s.name for s in checkpoint.layout.shards] == [SINGLE_NAME]
    # And our own reader agrees on every place.
    again = SafetensorsCheckpoint(tmp_path)
    assert again.tensors == checkpoint.tensors
    assert again.layout.index == checkpoint.layout.index


def test_planned_tensors_are_aligned() -> None:
    state = {f"{i}": sample(dtype, (3,)) for i, dtype in enumerate(DTYPES)}
    checkpoint = LoadedCheckpoint(state)
    for info in checkpoint.tensors.values():
        assert info.offset % info.dtype.itemsize == 0


def test_strided_tensors_are_planned_by_their_shape() -> None:
    checkpoint = LoadedCheckpoint({"w": torch.arange(6.0).view(2, 3).T})
    assert checkpoint.tensors["w"].shape == (3, 2)
    assert checkpoint.tensors["w"].nbytes == 24


# --- names ------------------------------------------------------------------------------------------------------------


def test_match_parameters() -> None:
    plain = {"model.a", "model.b"}
    assert match_parameters(plain, plain | {"model.extra"}, "model") == {n: n for n in plain}
    assert match_parameters({"transformer.h", "transformer.e"}, {"h", "e", "h.bias"}, "transformer") == {
        "transformer.h": "h",
        "transformer.e": "e",
    }
    assert match_parameters({"h", "e"}, {"transformer.h", "transformer.e"}, "transformer") == {
        "h": "transformer.h",
        "e": "transformer.e",
    }


def test_match_parameters_with_an_output_head_outside_the_base_model() -> None:
    """A head carries no prefix in either naming; only the rest does."""
    found = match_parameters({"transformer.h", "lm_head"}, {"h", "lm_head"}, "transformer")
    assert found == {"transformer.h": "h", "lm_head": "lm_head"}


@pytest.mark.parametrize(
    ("parameters", "tensors"),
    [({"a", "b"}, {"a"}), ({"a"}, set()), ({"q", "k"}, {"qk"}), ({"model.a", "a"}, {"a"})],
)
def test_match_parameters_gives_up(parameters: set[str], tensors: set[str]) -> None:
    assert match_parameters(parameters, tensors, "model") is None


# --- tensors that hold several matrices -----------------------------------------------------------------------------------


def fused() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "experts.gate_up_proj": torch.randn(3, 10, 4, generator=generator).to(torch.bfloat16),
        "experts.down_proj": torch.randn(3, 4, 5, generator=generator),
        "norm": torch.randn(7, generator=generator),
    }


def matrices(kinds: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"experts.{index}.{kind}": shape for index in range(3) for kind, shape in kinds.items()}


@pytest.mark.parametrize("loaded", [True, False])
def test_a_split_tensor_is_read_and_written_part_by_part(loaded: bool, tmp_path: Path) -> None:
    tensors = fused()
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = LoadedCheckpoint(tensors) if loaded else SafetensorsCheckpoint(tmp_path)
    checkpoint.split("experts.gate_up_proj", matrices({"gate": (5, 4), "up": (5, 4)}))
    checkpoint.split("experts.down_proj", matrices({"down": (4, 5)}))
    assert checkpoint.tensors.keys() == {"norm", *matrices({"gate": (), "up": (), "down": ()})}
    for index in range(3):
        gate, up = tensors["experts.gate_up_proj"][index].split(5)
        for name, expected in (("gate", gate), ("up", up), ("down", tensors["experts.down_proj"][index])):
            got = checkpoint.read(f"experts.{index}.{name}")
            assert got.dtype == expected.dtype
            assert torch.equal(got, expected), name

    out = tmp_path / "out"
    out.mkdir()
    writer = CheckpointWriter(checkpoint.layout, checkpoint, out)
    writer.write("experts.1.up", torch.zeros(5, 4, dtype=torch.bfloat16))
    writer.finish()
    written = load_file(out / "model.safetensors")
    assert written.keys() == tensors.keys()
    expected = tensors["experts.gate_up_proj"].clone()
    expected[1, 5:] = 0
    assert torch.equal(written["experts.gate_up_proj"], expected)
    assert all(torch.equal(written[name], tensors[name]) for name in ("experts.down_proj", "norm"))


def test_parts_that_do_not_fill_the_tensor_are_refused(tmp_path: Path) -> None:
    save_file(fused(), tmp_path / "model.safetensors")
    checkpoint = SafetensorsCheckpoint(tmp_path)
    with pytest.raises(ModelError, match=r"experts\.down_proj has shape \[3, 4, 5\].*3 matrices of \[4, 6\]"):
        checkpoint.split("experts.down_proj", matrices({"down": (4, 6)}))
    assert "experts.down_proj" in checkpoint.tensors
