"""The source of the CUDA kernels, compiled for the CPU and run lane by lane: their logic is checked without a device."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_matrices import assert_close, random_weight, same_bits, sparse_weight, tailed
from thanos.sparse.encoding import encode
from thanos.sparse.formats import PackedWeight
from thanos.sparse.kernels import cuda
from thanos.sparse.kernels.tuned import FEW, MANY, Launch

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a compiler of C++")

LANES = Path(__file__).parent / "lanes.h"
INSTRUCTIONS = Path(cuda.__file__).parent / "instructions.cu"


def compiled(name: str, folder: Path, macros: dict[str, Any]) -> Any:
    """Compile one kernel for the CPU; the function takes grid, threads of a block, arguments, and whether to go backwards."""
    source, instructions = cuda.source(name, **macros), INSTRUCTIONS.read_text(encoding="utf-8")
    assert instructions in source
    source = source.replace(instructions, f'#include "{LANES}"\n')
    [text] = re.findall(rf"^(?:.* )?{name}\((.*?)\) {{$", source, re.MULTILINE | re.DOTALL)
    for matrices in re.findall(r"#define MATRICES(.*?)\n\n", source, re.DOTALL):
        text = text.replace("MATRICES", matrices.replace("\\\n", " "))
    declared = text.split(",")
    kinds = [re.sub(r"\w+$", "", one.strip()) for one in declared]
    values = ", ".join(f"({kind})v[{index}]" for index, kind in enumerate(kinds))
    source += f"""
extern "C" void launch(const int* grid, int threads, const uint64_t* values, int backwards) {{
  run([](const uint64_t* v) {{ {name}({values}); }}, grid, threads, values, backwards);
}}
"""
    stem = folder / "_".join([name, *(str(int(value)) for value in macros.values())])
    stem.with_suffix(".cpp").write_text(source, encoding="utf-8")
    command = ["g++", "-O1", "-w", "-std=c++17", "-shared", "-fPIC", "-o", f"{stem}.so", f"{stem}.cpp"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(f"{stem}.so").launch


@pytest.fixture(scope="module")
def _kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder, known = tmp_path_factory.mktemp("kernels"), {}

    def find(name: str, device: torch.device, **macros: Any) -> Any:
        key = (name, *macros.values())
        if key not in known:
            known[key] = compiled(name, folder, macros)
        return known[key]

    return find


@pytest.fixture
def order(_kernels: Any, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Let the CPU run the kernels; ``backwards`` says in which order it takes the threads between two meetings."""
    order = SimpleNamespace(backwards=False)

    def run(kernel: Any, grid: tuple[int, ...], block: tuple[int, ...], values: list[int]) -> None:
        kernel((ctypes.c_int * 3)(*grid), block[0], (ctypes.c_uint64 * len(values))(*values), int(order.backwards))

    monkeypatch.setattr(cuda, "_has_clusters", lambda device: False)
    monkeypatch.setattr(cuda, "_kernel", _kernels)
    monkeypatch.setattr(cuda, "_run", run)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    return order


def multiply(packed: PackedWeight, x: Tensor, family: str, launch: Launch, bias: Tensor | None = None) -> Tensor:
    spec = packed.spec
    most = 32 if len(x) > 16 else 16
    return cuda.multiply(x, [packed.words], [packed.offsets], [bias], [spec.rows], spec.n, family, launch, most)[0]


def uneven(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Random weights with a full and an empty row, an empty tile, and tiles whose surplus is in one row alone."""
    weight = random_weight(rows, columns, 0.6, dtype=dtype)
    weight[min(5, rows - 1)], weight[-1] = 0.5, 0
    weight[:32, 32:64] = 0
    weight[:32, 64:96] = 0
    weight[7 % rows, 64:96] = 0.25
    return weight


def packings(rows: int, columns: int, dtype: torch.dtype) -> list[tuple[Tensor, Any]]:
    """Matrices and how each is packed: no tails, some, as many as save bytes, and the fixed format."""
    plain, long = random_weight(rows, columns, 0.6, dtype=dtype), uneven(rows, columns, dtype)
    return [(plain, encode), (long, encode), (long, tailed), (sparse_weight(rows, columns, dtype=dtype), encode)]


def stored(packed: PackedWeight) -> Tensor:
    """Which entries of a matrix of whole tiles are stored, by the bits of its masks."""
    spec = packed.spec
    assert packed.offsets is not None
    masks = packed.words.view(-1, 16)[(packed.offsets[:-1] >> 2)[:, None] + torch.arange(2)].view(-1, 32, 1)
    flags = (masks >> torch.arange(31, -1, -1, dtype=torch.int32)) & 1
    return flags.view(spec.strips, spec.tiles, 32, 32).transpose(1, 2).reshape(spec.rows, spec.columns).bool()


CASES = [
    (FEW, Launch(1, 1, 4), 1, torch.bfloat16),
    (FEW, Launch(2, 1, 2), 3, torch.float16),
    (MANY, Launch(1, 1, 4), 5, torch.bfloat16),
    (MANY, Launch(2, 1, 2), 13, torch.float16),
    (MANY, Launch(1, 1, 2), 17, torch.bfloat16),
    (MANY, Launch(2, 1, 3), 40, torch.bfloat16),
]


@pytest.mark.parametrize(("family", "launch", "tokens", "dtype"), CASES)
@pytest.mark.parametrize("backwards", [False, True])
def test_the_kernels_give_the_float64_product(family, launch, tokens, dtype, backwards, order):
    order.backwards = backwards
    for rows, columns in ((33, 31), (70, 300), (40, 416)):
        draw = torch.Generator().manual_seed(1)
        x, bias = torch.randn(tokens, columns, generator=draw).to(dtype), torch.randn(rows, generator=draw).to(dtype)
        for weight, pack in packings(rows, columns, dtype):
            packed = pack(weight)
            whole = multiply(packed, x, family, launch, bias)
            assert_close(whole, weight, x, bias)
            assert torch.equal(multiply(packed, x[:1], family, launch, bias), whole[:1])


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.7, 0.9, 0.97, 1.0])
def test_every_sparsity(sparsity, order):
    weight = random_weight(64, 160, sparsity)
    x = torch.randn(5, 160, generator=torch.Generator().manual_seed(2)).bfloat16()
    for packed in (encode(weight), tailed(weight)):
        assert_close(multiply(packed, x[:1], FEW, Launch(1, 1, 4)), weight, x[:1])
        assert_close(multiply(packed, x, MANY, Launch(1, 1, 4)), weight, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backwards", [False, True])
def test_the_matrix_is_expanded_bit_by_bit(dtype, backwards, order):
    order.backwards = backwards
    for rows, columns in ((33, 31), (100, 328), (64, 96)):
        for weight, pack in packings(rows, columns, dtype):
            packed = pack(weight)
            for strip in (0, 1):
                height = rows - 32 * strip
                got = cuda.expand(packed.words, packed.offsets, strip, height, columns, packed.spec.n, dtype)
                assert same_bits(got, weight[32 * strip :])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_the_rows_that_store_its_column(value, order):
    weight = uneven(64, 160, torch.bfloat16)
    packed = tailed(weight)
    assert packed.offsets is not None
    assert bool((packed.offsets & 3).any())
    for column in (3, 40, 70, 159):
        x = torch.randn(1, 160, generator=torch.Generator().manual_seed(5)).bfloat16()
        x[0, column] = value
        got = multiply(packed, x, FEW, Launch(2, 1, 2))[0]
        reads = stored(packed)[:, column]  # with the zeros of rows that are filled up
        assert 0 < reads.sum() < 64
        assert not got[reads].isfinite().any()
        assert_close(got[~reads][None], weight[~reads], x.nan_to_num(0, 0, 0))
