"""What a launch on a CUDA device consists of, checked without one: numbers, arguments and the kernels' source."""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_matrices import assert_close, random_weight, sparse_weight, tailed
from thanos.sparse.encoding import encode
from thanos.sparse.kernels import cuda
from thanos.sparse.kernels.tuned import FEW, MANY, MOST_MATRICES, TOKENS_OF_MANY, Launch, launch_for, plan

ROWS = [(1,), (33,), (6144,), (8192,), (28672,), (128256,), (4096, 1024, 1024), (14336, 14336), (1, 32, 33, 64)]
LAUNCHES = [Launch(1, 1, 4), Launch(2, 2, 8), Launch(4, 8, 16)]


def parameters(name: str) -> list[str]:
    """The declarations of a kernel's parameters, as its source has them."""
    source = cuda.source(name, n=0, tokens=1, flight=1, splits=1, half=False)
    [text] = re.findall(rf"^{name}\((.*?)\) {{$", source, re.MULTILINE | re.DOTALL) or re.findall(
        rf"\b{name}\((.*?)\) {{$", source, re.MULTILINE
    )
    for matrices in re.findall(r"#define MATRICES(.*?)\n\n", source, re.DOTALL):
        text = text.replace("MATRICES", matrices.replace("\\\n", " "))
    return [" ".join(one.split()) for one in text.split(",")]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("family", [FEW, MANY])
def test_a_plan_covers_every_row_and_token_within_the_limits_of_a_device(rows, family):
    tried = itertools.product(LAUNCHES, (1, 2, 3, 4, 7, 8, 9, 16, 17, 32, 128), (True, False), TOKENS_OF_MANY)
    for launch, tokens, clusters, most in tried:
        how = plan(tokens, rows, family, launch, most, clusters=clusters)
        strips, splits, passes = how.grid
        assert strips * 32 >= sum(rows)
        assert strips == sum(-(-count // 32) for count in rows)
        assert splits == (launch.splits if clusters else 1) <= 8  # blocks of a cluster that every device allows
        assert (passes - 1) * how.at_once < tokens <= passes * how.at_once
        assert how.at_once in ((1, 2, 4) if family == FEW else [size for size in TOKENS_OF_MANY if size <= most])
        assert strips < 1 << 31
        assert passes < 1 << 16
        assert how.block == (32 * launch.warps, 1, 1)
        starts = [0, *how.firsts, 1 << 31]
        found = [min(end, strips) - begin for begin, end in itertools.pairwise(starts) if begin < strips]
        assert found == [-(-count // 32) for count in rows]


@pytest.mark.parametrize("family", [FEW, MANY])
@pytest.mark.parametrize("tiles", [1, 2, 18, 128, 256, 448, 896])
def test_the_warps_of_a_strip_read_each_tile_once(family, tiles):
    for strips in (1, 18, 128, 256, 896):
        for n in (0, 16, 31):
            flight, splits, warps = launch_for("an unknown device", family, n, 18, strips, tiles)
            each = -(-tiles // splits)  # the loops of the kernels
            read = [
                tile + ahead
                for part in range(splits)
                for warp in range(warps)
                for tile in range(part * each + warp * flight, min(tiles, (part + 1) * each), warps * flight)
                for ahead in range(flight)
                if tile + ahead < min(tiles, (part + 1) * each)
            ]
            assert sorted(read) == list(range(tiles))


class Recorder:
    """A driver that reads the arguments of a launch as the kernel of that name would."""

    def __init__(self, name: str, results: list[int]) -> None:
        self.declared, self.results = parameters(name), results
        self.values: list[int] = []
        self.sizes: tuple[int, ...] = ()

    def cuLaunchKernel(self, function: Any, *arguments: Any) -> int:  # noqa: N802
        *sizes, memory, _, slots, extra = arguments
        assert (function, memory, extra) == ("function", 0, None)
        self.sizes = tuple(sizes)
        assert len(slots) == len(self.declared)
        kinds = [ctypes.c_void_p if "*" in one else ctypes.c_int for one in self.declared]
        self.values = [kind.from_address(slot).value or 0 for kind, slot in zip(kinds, slots, strict=True)]
        return self.results.pop(0)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for a device: a function that prepares the recorder of a kernel's launches."""

    def record(name: str, results: tuple[int, ...] = (0,)) -> Recorder:
        driver = Recorder(name, list(results))
        monkeypatch.setattr(cuda, "_driver", lambda: driver)
        return driver

    monkeypatch.setattr(cuda, "_has_clusters", lambda device: True)
    monkeypatch.setattr(cuda, "_kernel", lambda *_, **__: SimpleNamespace(func="function"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=5))
    return record


def addresses(tensors: list[Tensor | None]) -> list[int]:
    return [0 if one is None else one.data_ptr() for one in tensors] + [0] * (MOST_MATRICES - len(tensors))


@pytest.mark.parametrize(("family", "name", "tokens"), [(FEW, "few", 3), (MANY, "many", 9)])
@pytest.mark.parametrize("bitmap", [False, True])
def test_a_kernel_receives_the_arguments_that_it_declares(family, name, tokens, bitmap, device):
    rows = [33, 96, 70]
    packed = [tailed(random_weight(count, 96, 0.7)) if bitmap else encode(sparse_weight(count, 96)) for count in rows]
    words, offsets = [one.words for one in packed], [one.offsets for one in packed]
    biases = [None, torch.ones(96).bfloat16(), None]
    x = torch.randn(tokens, 96).bfloat16()
    driver = device(name)
    n = packed[0].spec.n
    outputs = cuda.multiply(x, words, offsets, biases, rows, n, family, Launch(2, 4, 8))
    assert [one.shape for one in outputs] == [(tokens, count) for count in rows]
    expected = [*addresses(words), *addresses(offsets), *addresses(biases), *addresses(outputs)]  # type: ignore[list-item]
    expected += [33, 96, 70, 0, 2, 5, (1 << 31) - 1, x.data_ptr(), 96, tokens, 3]
    assert driver.values == expected + ([1] if family == MANY else [])
    assert driver.sizes == (8, 4, 1, 256, 1, 1)


@pytest.mark.parametrize("bitmap", [False, True])
def test_the_kernel_that_expands_receives_the_strips_that_are_wanted(bitmap, device):
    packed = tailed(random_weight(100, 96, 0.7)) if bitmap else encode(sparse_weight(100, 96))
    driver = device("expand")
    out = cuda.expand(packed.words, packed.offsets, 2, 36, 96, packed.spec.n, torch.bfloat16)
    begin = packed.words.data_ptr() + (0 if bitmap else 4 * 2 * 3 * (32 + 16 * 16))
    offsets = 0 if packed.offsets is None else packed.offsets.data_ptr() + 4 * 2 * 3
    assert driver.values == [begin, offsets, out.data_ptr(), 36, 96, 3, 6, 1]
    assert driver.sizes == (1, 1, 1, 256, 1, 1)


def test_a_thread_without_a_context_gets_one_and_other_errors_are_raised(device, monkeypatch):
    waits: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    driver = device("expand", (201, 0))
    packed = encode(sparse_weight(32, 32))
    cuda.expand(packed.words, None, 0, 32, 32, 16, torch.bfloat16)
    assert waits == [1]
    assert not driver.results

    def check(result: int) -> None:
        raise RuntimeError(f"CUDA error {result}")

    monkeypatch.setattr(torch.cuda._utils, "_check_cuda", check)
    device("expand", (700,))
    with pytest.raises(RuntimeError, match="700"):
        cuda.expand(packed.words, None, 0, 32, 32, 16, torch.bfloat16)


def test_words_that_are_not_aligned_are_copied(device):
    packed = encode(sparse_weight(64, 96))
    words = torch.cat([packed.words[:1], packed.words])[1:]
    driver = device("few")
    cuda.multiply(torch.ones(1, 96).bfloat16(), [words], [None], [None], [64], 16, FEW, Launch(1, 1, 4))
    assert words.data_ptr() % 16
    assert driver.values[0] % 16 == 0
    assert driver.values[0] != words.data_ptr()


class Stream:
    """A stream that notes what it waits for."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.name, self.notes = name, notes

    def wait_stream(self, other: Stream) -> None:
        self.notes.append(f"{self.name} waits for {other.name}")

    def __enter__(self) -> None:
        self.notes.append(f"into {self.name}")

    def __exit__(self, *_: object) -> None:
        self.notes.append(f"out of {self.name}")


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes of two streams on which the library's products and the kernel that expands would run."""
    notes: list[str] = []
    first, second = Stream("first", notes), Stream("second", notes)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: first)
    monkeypatch.setattr(cuda, "_second_stream", lambda device: second)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    return notes


@pytest.mark.parametrize("parts", [1, 2, 4, 50])
def test_the_library_multiplies_by_parts_of_the_matrix_also_where_gradients_are_wanted(parts, notes, monkeypatch):
    weight, bias = sparse_weight(1000, 96), torch.randn(1000).bfloat16()
    expanded: list[tuple[int, int]] = []

    def expand(words: Tensor, offsets: Tensor | None, strip: int, rows: int, *_: Any) -> Tensor:
        notes.append("expand")
        expanded.append((32 * strip, 32 * strip + rows))
        return weight[32 * strip : 32 * strip + rows]

    monkeypatch.setattr(cuda, "expand", expand)
    x = torch.randn(40, 96).bfloat16().requires_grad_()
    for one in (None, bias):
        notes.clear()
        expanded.clear()
        got = cuda.by_library(x, weight, None, one, 1000, 16, parts)
        assert_close(got, weight, x.detach(), one, rounded=one is not None)
        assert [begin for begin, _ in expanded] == [0, *(end for _, end in expanded[:-1])]
        assert expanded[-1][1] == 1000
        assert len(expanded) == min(parts, 4)  # of 256 rows
        each = ["expand", "second waits for first", "into second", "out of second"]
        assert notes == (["expand"] if parts == 1 else each * len(expanded) + ["first waits for second"])


def test_the_streams_meet_also_if_a_part_cannot_be_expanded(notes, monkeypatch):
    weight = sparse_weight(512, 96)

    def expand(words: Tensor, offsets: Tensor | None, strip: int, rows: int, *_: Any) -> Tensor:
        if strip:
            raise RuntimeError("out of memory")
        return weight[:rows]

    monkeypatch.setattr(cuda, "expand", expand)
    with pytest.raises(RuntimeError, match="out of memory"):
        cuda.by_library(torch.randn(40, 96).bfloat16(), weight, None, None, 512, 16, 2)
    assert notes[-1] == "first waits for second"


@pytest.mark.parametrize(
    ("tokens", "rows", "most", "parts"),
    [
        (2048, 4096, 1, 1),
        (2048, 4096, 4, 2),
        (2048, 28672, 4, 4),
        (512, 4096, 4, 1),
        (2047, 4096, 4, 1),
        (33, 32, 2, 1),
    ],
)
def test_a_part_has_enough_outputs_for_a_device(tokens, rows, most, parts):
    assert cuda.parts_of(tokens, rows, most) == parts


VARIANTS = [
    (FEW, 16, 1, 4, 1, 0),
    (FEW, 0, 2, 2, 4, 1),
    (FEW, 31, 4, 1, 8, 0),
    (FEW, 0, 1, 2, 1, 0),
    (FEW, 0, 4, 2, 2, 0),
]
VARIANTS += [(MANY, 16, 8, 2, 2, 0), (MANY, 0, 16, 2, 4, 0), (MANY, 8, 16, 1, 1, 1), (MANY, 0, 32, 2, 1, 0)]
VARIANTS += [
    (MANY, 31, 32, 2, 8, 1),
    ("expand", 0, 1, 1, 1, 0),
    ("expand", 16, 1, 1, 1, 1),
]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs CUDA's compiler")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_the_kernels_compile_without_spilled_registers(architecture, tmp_path):
    for index, (name, n, tokens, flight, splits, half) in enumerate(VARIANTS):
        file = tmp_path / f"{index}.cu"
        splits = splits if architecture == "sm_90" else 1
        file.write_text(cuda.source(name, n=n, tokens=tokens, flight=flight, splits=splits, half=bool(half)))
        command = ["nvcc", "-cubin", f"-arch={architecture}", "-Xptxas=-v", "-o", str(tmp_path / "out"), str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert set(re.findall(r"(\d+) bytes spill", done.stderr)) == {"0"}, done.stderr
        assert all(int(size) <= 48 << 10 for size in re.findall(r"(\d+) bytes smem", done.stderr))
