"""Matrices that are sparse in a pattern, their packed products, and comparisons."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import tiny_model, tiny_tokenizer
from thanos.sparse.encoding import count_entries, encode
from thanos.sparse.formats import PackedSpec, PackedWeight
from thanos.sparse.ops import packed_linear

DTYPES = (torch.bfloat16, torch.float16)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
"""Values of a parameter ``device``; tests/sparse/conftest.py skips those that are not there."""

EPSILON = {torch.bfloat16: 2**-8, torch.float16: 2**-11}

SHAPES = [(1, 1), (1, 64), (33, 31), (64, 576), (100, 1000), (257, 129), (96, 2080)]


def sparse_weight(
    rows: int, columns: int, *, n: int = 16, m: int = 32, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Tensor:
    """Random weights of which n in each m of a row stay; a last group that is shorter keeps n at most."""
    draw = torch.Generator().manual_seed(seed)
    wide = -(-columns // m) * m
    scores = torch.rand(rows, wide // m, m, generator=draw)
    kept = (scores.argsort(-1).argsort(-1) < n).view(rows, wide)[:, :columns]
    weight = torch.randn(rows, columns, generator=draw) / (n * columns / m) ** 0.5
    return weight.masked_fill(~kept, 0).to(dtype)  # a product would give -0


def random_weight(
    rows: int, columns: int, sparsity: float, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Tensor:
    """Random weights without a pattern."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draw) / columns**0.5
    return weight.masked_fill(torch.rand(rows, columns, generator=draw) < sparsity, 0).to(dtype)


def product(packed: PackedWeight, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return packed_linear(x, packed.words, packed.offsets, bias, packed.spec.rows, packed.spec.n)


def on(packed: PackedWeight, device: str) -> PackedWeight:
    offsets = None if packed.offsets is None else packed.offsets.to(device)
    return PackedWeight(packed.spec, packed.words.to(device), offsets)


def version_1(weight: Tensor) -> PackedWeight:
    """The bitmap format as version 1 stored it: every tile as wide as its fullest row, no tails, offsets in units."""
    counts = count_entries(weight)
    counts[1], counts[2] = counts[0], 0
    words = 16 * int((counts[0].long() + 2).sum())
    spec = PackedSpec("bitmap", weight.shape[0], weight.shape[1], weight.dtype, 0, words)
    packed = encode(weight, spec, counts)
    assert packed.offsets is not None
    return PackedWeight(dataclasses.replace(spec, version=1), packed.words, packed.offsets // 4)


def tailed(weight: Tensor) -> PackedWeight:
    """The bitmap format in the fewest bytes: with a tail wherever it saves a unit, as ``encode`` does with long rows only."""
    shape = rows, columns = weight.shape[0], weight.shape[1]
    strips, across = -(-rows // 32), -(-columns // 32)
    kept = torch.zeros(strips * 32, across * 32, dtype=torch.bool)
    kept[:rows, :columns] = weight.view(torch.int16) != 0
    held = kept.view(strips, 32, across, 32).sum(-1)
    n, tail = held.amax(1), torch.zeros(strips, across, dtype=torch.int64)
    for less in range(31, -1, -1):
        units = ((held - less).clamp(min=0).sum(1) + 31) // 32
        better = (units <= 2) & (less + units < n + tail)
        n, tail = torch.where(better, less, n), torch.where(better, units, tail)
    counts = torch.stack([held.amax(1), n, tail]).to(torch.uint8)
    return encode(weight, PackedSpec("bitmap", *shape, weight.dtype, 0, 16 * int((2 + n + tail).sum())), counts)


def assert_close(got: Tensor, weight: Tensor, x: Tensor, bias: Tensor | None = None, *, rounded: bool = False) -> None:
    """The result is the float64 product up to float32 sums of that length and one rounding.

    ``rounded``: the product may be rounded before the bias is added, as torch's own linear layer does with many tokens.
    """
    wide = weight.double().cpu()
    product = x.double().cpu() @ wide.T
    exact = product + (0 if bias is None else bias.double().cpu())
    size = x.double().abs().cpu() @ wide.abs().T + (0 if bias is None else bias.double().abs().cpu())
    allowed = EPSILON[got.dtype] * (exact.abs() + (product.abs() if rounded else 0)) + 1e-5 * size + 1e-7
    assert got.shape == exact.shape
    assert bool(((got.double().cpu() - exact).abs() <= allowed).all())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two 16-bit tensors are equal bit by bit."""
    return a.dtype == b.dtype and torch.equal(a.view(torch.int16), b.view(torch.int16))


def save_pruned(
    folder: Path, architecture: str = "llama", *, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> Path:
    """Save a tiny model whose linear layers keep 16 of 32 weights; every second block has no pattern instead."""
    saving = {key: changes.pop(key) for key in ("max_shard_size",) if key in changes}
    model = tiny_model(architecture, dtype=dtype, **changes)
    for index, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name and "embed_out" not in name:
            shape = tuple(module.weight.shape)
            new = sparse_weight(*shape, dtype=dtype, seed=index)
            if ".1." in name:
                new = random_weight(*shape, 0.7, dtype=dtype, seed=index)
            module.weight.data = new
    model.save_pretrained(folder, **saving)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    """Relative path → content of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
