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

from sparse_matrices import assert_close, random_weight, same_bits, sparse_weight
from thanos.sparse.encoding import encode
from thanos.sparse.formats import PackedWeight
from thanos.sparse.kernels import cuda
from thanos.sparse.kernels.tuned import FEW, MANY, Launch

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a compiler of C++")

LANES = Path(__file__).parent / "lanes.h"


def compiled(name: str, folder: Path, macros: dict[str, Any]) -> Any:
    """Compile one kernel for the CPU; the function takes grid, threads of a block, arguments, and whether to go backwards."""
    source = cuda.source(**macros)
    begin, end = source.index("typedef unsigned int u32;"), source.index("struct Tile {")
    source = source[:begin] + f'#include "{LANES}"\n' + source[end:]  # the instructions in assembler
    [matrices] = re.findall(r"#define MATRICES(.*?)\n\n", source, re.DOTALL)
    [text] = re.findall(rf"^(?:.* )?{name}\((.*?)\) {{$", source, re.MULTILINE | re.DOTALL)
    declared = text.replace("MATRICES", matrices.replace("\\\n", " ")).split(",")
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
    return cuda.multiply(x, [packed.words], [packed.offsets], [bias], [spec.rows], spec.n, family, launch)[0]


def uneven(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Random weights with a full and an empty row, an empty tile, and tiles whose surplus is in one row alone."""
    weight = random_weight(rows, columns, 0.6, dtype=dtype)
    weight[min(5, rows - 1)], weight[-1] = 0.5, 0
    weight[:32, 32:64] = 0
    weight[:32, 64:96] = 0
    weight[7 % rows, 64:96] = 0.25
    return weight


CASES = [
    (FEW, Launch(1, 1, 4), 1, torch.bfloat16),
    (FEW, Launch(2, 1, 2), 3, torch.float16),
    (MANY, Launch(1, 1, 4), 5, torch.bfloat16),
    (MANY, Launch(2, 1, 2), 13, torch.float16),
    (MANY, Launch(1, 1, 2), 35, torch.bfloat16),
]


@pytest.mark.parametrize(("family", "launch", "tokens", "dtype"), CASES)
@pytest.mark.parametrize("backwards", [False, True])
def test_the_kernels_give_the_float64_product(family, launch, tokens, dtype, backwards, order):
    order.backwards = backwards
    for rows, columns in ((33, 31), (70, 300), (40, 416)):
        draw = torch.Generator().manual_seed(1)
        x, bias = torch.randn(tokens, columns, generator=draw).to(dtype), torch.randn(rows, generator=draw).to(dtype)
        for weight in (uneven(rows, columns, dtype), sparse_weight(rows, columns, dtype=dtype)):
            packed = encode(weight)
            whole = multiply(packed, x, family, launch, bias)
            assert_close(whole, weight, x, bias)
            assert torch.equal(multiply(packed, x[:1], family, launch, bias), whole[:1])


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.7, 0.9, 0.97, 1.0])
def test_every_sparsity(sparsity, order):
    weight = random_weight(64, 160, sparsity)
    packed = encode(weight)
    x = torch.randn(5, 160, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert_close(multiply(packed, x[:1], FEW, Launch(1, 1, 4)), weight, x[:1])
    assert_close(multiply(packed, x, MANY, Launch(1, 1, 4)), weight, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backwards", [False, True])
def test_the_matrix_is_expanded_bit_by_bit(dtype, backwards, order):
    order.backwards = backwards
    for rows, columns in ((33, 31), (100, 328), (64, 96)):
        for weight in (uneven(rows, columns, dtype), sparse_weight(rows, columns, dtype=dtype)):
            packed = encode(weight)
            for strip in (0, 1):
                height = rows - 32 * strip
                got = cuda.expand(packed.words, packed.offsets, strip, height, columns, packed.spec.n, dtype)
                assert same_bits(got, weight[32 * strip :])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_the_rows_that_store_its_column(value, order):
    weight = uneven(64, 160, torch.bfloat16)
    packed = encode(weight)
    assert packed.offsets is not None
    assert bool((packed.offsets & 3).any())
    for column in (3, 40, 70, 159):
        x = torch.randn(1, 160, generator=torch.Generator().manual_seed(5)).bfloat16()
        x[0, column] = value
        got = multiply(packed, x, FEW, Launch(2, 1, 2))[0]
        reads = weight[:, column] != 0
        assert not got[reads].isfinite().any()
        # A row that is filled up stores zeros at its first columns, and these read x too.
        clean = ~reads & ~got.isnan()
        assert clean.sum() > 0
        assert_close(got[clean][None], weight[clean], x.nan_to_num(0, 0, 0))
