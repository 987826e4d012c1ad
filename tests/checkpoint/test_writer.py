"""The writer's files are the library's files byte for byte."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import save_tiny
from thanos.bench.synthetic import RandomCheckpoint
from thanos.checkpoint.cast import in_dtype
from thanos.checkpoint.in_memory import LoadedCheckpoint
from thanos.checkpoint.layout import Checkpoint, Layout, TensorSpec, plan_layout
from thanos.checkpoint.reader import SafetensorsCheckpoint
from thanos.checkpoint.weight_files import INDEX_NAME, SINGLE_NAME
from thanos.checkpoint.writer import CheckpointWriter
from thanos.errors import ResourceError, ThanosError

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("in") / "model", dtype=torch.bfloat16, max_shard_size="30KB")


def tensor_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def mirror(checkpoint: Checkpoint, folder: Path) -> CheckpointWriter:
    """Return a writer of the checkpoint's own layout."""
    return CheckpointWriter(checkpoint.layout, checkpoint, folder)


# --- the writer -------------------------------------------------------------------------------------------------------


def test_nothing_written_gives_the_same_files(sharded: Path, tmp_path: Path) -> None:
    writer = mirror(SafetensorsCheckpoint(sharded), tmp_path)
    writer.finish()
    names = [path.name for path in tensor_files(sharded)]
    assert len(names) > 2
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, INDEX_NAME])
    for name in [*names, INDEX_NAME]:
        assert (tmp_path / name).read_bytes() == (sharded / name).read_bytes()


@pytest.mark.parametrize("seed", range(4))
def test_tensors_written_in_any_order(sharded: Path, tmp_path: Path, seed: int) -> None:
    checkpoint = SafetensorsCheckpoint(sharded)
    draw = random.Random(seed)
    changed = draw.sample(sorted(checkpoint.tensors), k=len(checkpoint.tensors) * 2 // 3)
    writer = mirror(checkpoint, tmp_path)
    expected: dict[str, torch.Tensor] = {}
    for number, name in enumerate(changed):
        info = checkpoint.tensors[name]
        generator = torch.Generator().manual_seed(number)
        expected[name] = torch.randn(info.shape, generator=generator).to(info.dtype)
        writer.write(name, expected[name])
        assert torch.equal(writer.read(name), expected[name])
    assert writer.written == set(changed)
    writer.finish()
    assert writer.written == set(checkpoint.tensors)
    for path in tensor_files(sharded):
        before, after = load_file(path), load_file(tmp_path / path.name)
        assert list(before) == list(after)
        for name, tensor in after.items():
            assert torch.equal(tensor, expected.get(name, before[name])), name
            assert tensor.dtype == before[name].dtype
        layout = next(shard for shard in checkpoint.layout.shards if shard.name == path.name)
        old, new = path.read_bytes(), (tmp_path / path.name).read_bytes()
        assert len(old) == len(new)
        assert old[: len(layout.header)] == new[: len(layout.header)]
        for name, info in checkpoint.tensors.items():
            if info.shard == path.name and name not in expected:
                place = slice(info.offset, info.offset + info.nbytes)
                assert old[place] == new[place]


def test_a_tensor_written_twice_keeps_the_last(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    save_file({"w": torch.zeros(3), "v": torch.ones(3)}, tmp_path / "in" / SINGLE_NAME)
    writer = mirror(SafetensorsCheckpoint(tmp_path / "in"), tmp_path / "out")
    writer.write("w", torch.full((3,), 1.0))
    writer.write("w", torch.full((3,), 2.0))
    writer.finish()
    read = load_file(tmp_path / "out" / SINGLE_NAME)
    assert read["w"].tolist() == [2, 2, 2]
    assert read["v"].tolist() == [1, 1, 1]


def test_strided_tensors_parameters_and_negative_zeros(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    state = {
        "w": torch.zeros(3, 2),
        "p": torch.zeros(2),
        "z": torch.zeros(2),
        "s": torch.tensor(0.0),
        "e": torch.empty(0),
    }
    save_file(state, tmp_path / "in" / SINGLE_NAME)
    writer = mirror(SafetensorsCheckpoint(tmp_path / "in"), tmp_path / "out")
    transposed = torch.arange(6.0).view(2, 3).T
    writer.write("w", transposed)
    writer.write("p", torch.nn.Parameter(torch.tensor([1.0, 2.0])))
    writer.write("z", torch.tensor([-0.0, float("nan")]))
    writer.write("s", torch.tensor(4.0))
    writer.write("e", torch.empty(0))
    writer.finish()
    read = load_file(tmp_path / "out" / SINGLE_NAME)
    assert torch.equal(read["w"], transposed)
    assert read["p"].tolist() == [1, 2]
    assert torch.signbit(read["z"][0])
    assert read["z"][1].isnan()
    assert read["s"].item() == 4
    assert torch.equal(transposed, torch.arange(6.0).view(2, 3).T), "the tensor given is not changed"


def test_the_bits_of_nan_and_odd_dtypes_are_copied(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    bits = torch.arange(-32768, 32767, dtype=torch.int32).to(torch.int16)
    state = {"all": bits.view(torch.bfloat16), "f8": torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)}
    save_file(state, tmp_path / "in" / SINGLE_NAME)
    writer = mirror(SafetensorsCheckpoint(tmp_path / "in"), tmp_path / "out")
    writer.write("all", state["all"])
    writer.finish()
    assert (tmp_path / "out" / SINGLE_NAME).read_bytes() == (tmp_path / "in" / SINGLE_NAME).read_bytes()


def test_copies_larger_than_one_span(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thanos.checkpoint.reader._SPAN_BYTES", 64)
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    state = {f"t{i}": torch.randn(n) for i, n in enumerate((1, 15, 16, 17, 500))}
    save_file(state, tmp_path / "in" / SINGLE_NAME)
    mirror(SafetensorsCheckpoint(tmp_path / "in"), tmp_path / "out").finish()
    assert (tmp_path / "out" / SINGLE_NAME).read_bytes() == (tmp_path / "in" / SINGLE_NAME).read_bytes()


def test_a_loaded_checkpoint_is_written_as_the_library_would(tmp_path: Path) -> None:
    state = {"b": torch.randn(3, 4).bfloat16(), "a": torch.randn(5), "c": torch.randn(2, 2), "f": torch.tensor([True])}
    writer = mirror(LoadedCheckpoint(state), tmp_path)
    writer.write("a", state["a"] * 2)
    writer.finish()
    save_file({**state, "a": state["a"] * 2}, tmp_path / "reference", metadata={"format": "pt"})
    assert (tmp_path / SINGLE_NAME).read_bytes() == (tmp_path / "reference").read_bytes()


def test_a_loaded_checkpoint_in_shards(tmp_path: Path) -> None:
    state = {f"t{i}": torch.randn(10) for i in range(5)}
    writer = mirror(LoadedCheckpoint(state, max_shard_bytes=80), tmp_path)
    for name in ("t4", "t0"):
        writer.write(name, state[name])
    writer.finish()
    again = SafetensorsCheckpoint(tmp_path)
    assert len(again.layout.shards) == 3
    assert all(torch.equal(again.read(name), tensor) for name, tensor in state.items())


@pytest.mark.parametrize("wrong", [torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.float16), torch.zeros(6)])
def test_a_tensor_that_does_not_fit_is_refused(tmp_path: Path, wrong: torch.Tensor) -> None:
    writer = mirror(LoadedCheckpoint({"w": torch.zeros(3, 2)}), tmp_path)
    with pytest.raises(ValueError, match=r"w is .*float32 \(3, 2\) in the layout"):
        writer.write("w", wrong)
    assert writer.written == set()


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_tensor_written_in_parts_has_the_same_bytes(tmp_path: Path, rows: int) -> None:
    source = tmp_path / "in"
    source.mkdir()
    old, new = torch.zeros(8, 6, dtype=torch.bfloat16), torch.randn(8, 6).bfloat16()
    save_file({"a": old, "b": old.clone()}, source / SINGLE_NAME)
    writer = mirror(SafetensorsCheckpoint(source), tmp_path)
    writer.write_parts("a", (part.T.contiguous().T for part in new.split(rows)))
    writer.finish()
    written = load_file(tmp_path / SINGLE_NAME)
    assert torch.equal(written["a"], new)
    assert torch.equal(written["b"], old)


@pytest.mark.parametrize("parts", [[(5,), (4,)], [(3,)], [], [(4,), (4,), (1,)]])
def test_parts_that_do_not_fill_the_tensor_are_refused(tmp_path: Path, parts: list[tuple[int, ...]]) -> None:
    checkpoint = LoadedCheckpoint({"a": torch.zeros(8), "b": torch.zeros(8)})
    writer = mirror(checkpoint, tmp_path)
    writer.write("b", torch.full((8,), 7.0))
    with pytest.raises(ValueError, match="part"):
        writer.write_parts("a", (torch.ones(shape) for shape in parts))
    with pytest.raises(ValueError, match="part does not fit"):
        writer.write_parts("a", [torch.ones(8).double()])
    assert writer.written == {"b"}
    assert torch.equal(writer.read("b"), torch.full((8,), 7.0))


def test_an_input_that_shrinks_during_the_run(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    save_file({"w": torch.randn(1000)}, tmp_path / "in" / SINGLE_NAME)
    writer = mirror(SafetensorsCheckpoint(tmp_path / "in"), tmp_path / "out")
    with (tmp_path / "in" / SINGLE_NAME).open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ResourceError, match="became shorter"):
        writer.finish()


def test_disk_too_small(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = SafetensorsCheckpoint(sharded)
    needed = sum(path.stat().st_size for path in tensor_files(sharded))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, needed - 1))
    with pytest.raises(ResourceError, match=r"disk full: the output needs .* GB .* free"):
        mirror(checkpoint, tmp_path)
    assert list(tmp_path.iterdir()) == [], "nothing is written"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, needed))
    mirror(checkpoint, tmp_path).finish()
    assert len(tensor_files(tmp_path)) == len(checkpoint.layout.shards)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system cannot reserve space")
def test_disk_that_fills_between_the_check_and_the_reservation(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reservation is where a disk that others fill too says no; it is a user's matter, not a crash."""

    def no_room(*arguments: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    with pytest.raises((ThanosError, OSError)) as caught:
        mirror(SafetensorsCheckpoint(sharded), tmp_path)
    if isinstance(caught.value, OSError):
        assert caught.value.errno == errno.ENOSPC  # the caller tells the user; it must know which error it is


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system cannot reserve space")
@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_that_cannot_reserve_space(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Some file systems refuse to reserve; the files can be written all the same."""

    def refuse(*arguments: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    mirror(SafetensorsCheckpoint(sharded), tmp_path).finish()
    for path in tensor_files(sharded):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


# --- layouts of other tensors than the input's ------------------------------------------------------------------------


def planned(tensors: dict[str, torch.Tensor], limit: int) -> Layout:
    return plan_layout({name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}, limit)


@pytest.mark.parametrize("limit", [40, 10**9])
def test_a_planned_layout_holds_tensors_of_other_names_shapes_and_dtypes(tmp_path: Path, limit: int) -> None:
    """A smaller matrix, a packed one with its indices, and an untouched tensor, as a smaller or packed model has them."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    state = {"w": torch.randn(6, 8), "v": torch.randn(4, 8).bfloat16(), "norm": torch.randn(7).bfloat16()}
    save_file(state, tmp_path / "in" / SINGLE_NAME)
    changed = {
        "w": state["w"][:, :5].contiguous(),
        "v.values": state["v"][:, ::2].contiguous(),
        "v.indices": torch.arange(16, dtype=torch.uint8).view(4, 4),
    }
    output = {**changed, "norm": state["norm"]}
    writer = CheckpointWriter(planned(output, limit), SafetensorsCheckpoint(tmp_path / "in"), tmp_path / "out")
    for name in ("v.indices", "w", "v.values"):
        writer.write(name, changed[name])
        assert torch.equal(writer.read(name), changed[name])
    writer.finish()
    files = tensor_files(tmp_path / "out")
    assert len(files) == (3 if limit == 40 else 1)
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert read.keys() == output.keys()
    for name, tensor in output.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name
    assert (tmp_path / "out" / INDEX_NAME).exists() == (len(files) > 1)
    again = SafetensorsCheckpoint(tmp_path / "out")  # the index agrees with the files
    assert all(torch.equal(again.read(name), tensor) for name, tensor in output.items())


@pytest.mark.parametrize("count", [3, 5])
def test_bytes_that_do_not_fit_a_planned_layout_are_refused(tmp_path: Path, count: int) -> None:
    """A changed tensor that nobody writes must not be filled from the input, nor run into its neighbour."""
    source = LoadedCheckpoint({"a": torch.ones(4), "b": torch.full((4,), 2.0)})
    writer = CheckpointWriter(planned({"a": torch.ones(count), "b": torch.ones(4)}, 10**9), source, tmp_path)
    writer.write("b", torch.full((4,), 3.0))
    with pytest.raises(ValueError, match=rf"a has {4 * count} bytes in the layout, but 16 in the source"):
        writer.finish()
    assert "a" not in writer.written
    assert writer.read("b").tolist() == [3.0] * 4


class Squares:
    """A source of bytes that are made on the way, in spans of odd lengths, and nothing but a source of bytes."""

    def raw_spans(self, name: str) -> Iterator[memoryview]:
        data = (torch.arange(10.0) ** int(name)).numpy().tobytes()
        for start in range(0, len(data), 7):
            yield memoryview(data)[start : start + 7]


def test_the_writer_asks_its_source_for_bytes_alone(tmp_path: Path) -> None:
    writer = CheckpointWriter(planned({"1": torch.empty(10), "2": torch.empty(10)}, 10**9), Squares(), tmp_path)
    writer.finish()
    read = load_file(tmp_path / SINGLE_NAME)
    assert torch.equal(read["1"], torch.arange(10.0))
    assert torch.equal(read["2"], torch.arange(10.0) ** 2)


# --- every checkpoint ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=["files", "memory", "random", "cast"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    state = {"m": torch.randn(6, 4).bfloat16(), "norm": torch.ones(5), "fused": torch.randn(2, 3, 4)}
    if request.param == "memory":
        return LoadedCheckpoint(state, max_shard_bytes=60)
    if request.param == "random":
        return RandomCheckpoint({name: tensor.to("meta") for name, tensor in state.items()})
    save_file(state, tmp_path / SINGLE_NAME)
    stored = SafetensorsCheckpoint(tmp_path)
    return in_dtype(stored, torch.float16) if request.param == "cast" else stored


def test_every_checkpoint_says_the_same_by_each_way_of_reading(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("reader", "in_memory", "layout"):
        monkeypatch.setattr(f"thanos.checkpoint.{module}.CHUNK_ENTRIES", 5)
    checkpoint.split("fused", {"first": (3, 4), "second": (12,)})
    assert checkpoint.tensors.keys() == {"m", "norm", "first", "second"}
    assert checkpoint.layout.nbytes == sum(shard.size for shard in checkpoint.layout.shards)
    for name, spec in checkpoint.tensors.items():
        whole, chunks = checkpoint.read(name), list(checkpoint.chunks(name))
        assert (whole.dtype, tuple(whole.shape)) == (spec.dtype, spec.shape)
        assert spec.numel == whole.numel()
        assert spec.nbytes == whole.nbytes
        assert torch.equal(torch.cat(chunks).view(whole.shape), whole)
        assert torch.equal(checkpoint.entries(name, 2, 3), whole.reshape(-1)[2:5])
        assert b"".join(checkpoint.raw_spans(name)) == whole.reshape(-1).view(torch.uint8).numpy().tobytes()
    (tmp_path / "out").mkdir()
    mirror(checkpoint, tmp_path / "out").finish()
    read = {name: tensor for file in tensor_files(tmp_path / "out") for name, tensor in load_file(file).items()}
    assert read.keys() == {"m", "norm", "fused"}
    assert torch.equal(read["m"], checkpoint.read("m"))
    assert torch.equal(read["fused"].view(2, 12)[1], checkpoint.read("second"))
