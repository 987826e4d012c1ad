"""Time the product of packed matrices beside torch's dense one, on random weights that no cache holds.

    python benchmarks/packed.py [--device cuda] [--tokens 1,16] [--shapes 4096x4096,4096x14336] [--results FILE]
    python benchmarks/packed.py --tune src/thanos/sparse/kernels/tuned.json

Prints one JSON line for each shape, pattern and number of tokens: microseconds of both products, their ratio, the fraction of
bytes, and the relative error. On CUDA all products of a round are one CUDA graph. Dense and packed rounds alternate.

``--tune`` (CUDA) times every division of the kernels' work for every shape, and writes the fastest into the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from thanos.bench.measure import machine, synchronize
from thanos.sparse.formats import PackedWeight, encode
from thanos.sparse.kernels.tuned import FEW, MANY, Launch, Settings, kind_of
from thanos.sparse.ops import packed_linear

PATTERNS = {"16:32": 0.0, "50 %": 0.5, "60 %": 0.6, "70 %": 0.7}
"""Pattern → sparsity of one without a pattern; 0 for 16:32."""

SHAPES = {
    "cuda": "6144x4096,4096x4096,28672x4096,4096x14336,8192x28672",
    "cpu": "576x576,1536x576,4864x896,4096x4096,14336x4096,4096x14336",
}

TUNED_SHAPES = "1024x4096,4096x4096,6144x4096,14336x4096,28672x4096,4096x14336,8192x28672"

ROTATED_BYTES = {"cuda": 3 << 27, "cpu": 3 << 26}
"""Bytes of packed weights among which the products rotate: more than the last cache."""


def make(shape: tuple[int, int], sparsity: float, dtype: torch.dtype) -> Tensor:
    """Return random weights in a pattern."""
    weight = torch.randn(shape)
    if sparsity:
        return weight.masked_fill(torch.rand(shape) < sparsity, 0).to(dtype)
    rank = torch.rand(shape[0], shape[1] // 32, 32).argsort(-1).argsort(-1)
    return weight.masked_fill((rank >= 16).view(shape), 0).to(dtype)


def repeated(weight: Tensor, rows: int, device: str) -> tuple[Tensor, PackedWeight]:
    """Return a dense matrix that repeats the rows of another, and the same packed: large ones are slow to draw and to pack."""
    packed, times = encode(weight), -(-rows // len(weight))
    if times == 1:
        offsets = None if packed.offsets is None else packed.offsets.to(device)
        return weight.to(device), PackedWeight(packed.spec, packed.words.to(device), offsets)
    if rows % len(weight) or len(weight) % 32:
        raise ValueError(f"{rows} rows are not a multiple of {len(weight)}")
    spec = dataclasses.replace(packed.spec, rows=rows, words=times * packed.spec.words)
    words, offsets = packed.words.to(device).repeat(times), None
    if packed.offsets is not None:
        begins = torch.arange(times, dtype=torch.int32)[:, None] * packed.offsets[-1]
        offsets = torch.cat([(packed.offsets[:-1] + begins).view(-1), packed.offsets[-1:] * times]).to(device)
    return weight.to(device).repeat(times, 1), PackedWeight(spec, words, offsets)


def drawn_rows(rows: int) -> int:
    """Return how many rows of a matrix are drawn; the others repeat them."""
    return next((count for count in (1024, 768, 576) if rows % count == 0 and rows > 4096), rows)


def rounds(works: list[Callable[[int], Any]], count: int, device: str, repeats: int) -> list[float]:
    """Return the median microseconds of one call of each work, called with 0 to count − 1 in each round."""

    def plain(work: Callable[[int], Any]) -> Callable[[], None]:
        def run() -> None:
            for index in range(count):
                work(index)

        return run

    runs = [plain(work) for work in works]
    for run in runs:
        run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        graphs = [torch.cuda.CUDAGraph() for _ in runs]
        for graph, run in zip(graphs, runs, strict=True):
            with torch.cuda.graph(graph):
                run()
        runs = [graph.replay for graph in graphs]
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for index, run in enumerate(runs):
            synchronize(device)
            began = time.perf_counter()
            run()
            synchronize(device)
            seconds[index].append((time.perf_counter() - began) / count)
    return [1e6 * statistics.median(times) for times in seconds]


def measure(shape: tuple[int, int], pattern: str, tokens: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one shape and pattern."""
    dtype, device = getattr(torch, arguments.dtype), arguments.device
    first, packed = repeated(make((drawn_rows(shape[0]), shape[1]), PATTERNS[pattern], dtype), shape[0], device)
    count = max(2, min(48, ROTATED_BYTES[torch.device(device).type] // packed.spec.nbytes + 1))
    dense = [first, *(first.clone() for _ in range(count - 1))]
    words = [packed.words, *(packed.words.clone() for _ in range(count - 1))]
    x = torch.randn(tokens, shape[1]).to(device, dtype)
    rest = (packed.offsets, None, shape[0], packed.spec.n)
    exact = x[:16].double() @ first.double().T
    error = (packed_linear(x, words[0], *rest)[:16].double() - exact).norm() / exact.norm()
    del exact
    theirs, ours = rounds(
        [lambda i: F.linear(x, dense[i]), lambda i: packed_linear(x, words[i], *rest)],
        count,
        device,
        arguments.repeats,
    )
    return {
        "shape": f"{shape[0]}x{shape[1]}",
        "pattern": pattern,
        "tokens": tokens,
        "dense_us": round(theirs, 2),
        "packed_us": round(ours, 2),
        "ratio": round(theirs / ours, 3),
        "bytes": round(packed.spec.nbytes / packed.spec.dense_bytes, 4),
        "gb_per_s": round(packed.spec.nbytes / ours / 1e3, 1),
        "error": float(f"{error.item():.2e}"),
    }


def launches(family: str, n: int) -> Iterator[Launch]:
    """Yield the divisions of a kernel's work that are tried."""
    for flight in (1, 2, 4) if family == FEW and 0 < n <= 16 else (1, 2):
        for splits in (1, 2, 4):
            for warps in (4, 8, 16) if family == FEW else (4, 8):
                yield Launch(flight, splits, warps)


def tune(arguments: argparse.Namespace) -> None:
    """Time all divisions for all shapes, and write the fastest into the file."""
    device, name = arguments.device, torch.cuda.get_device_name(torch.device(arguments.device))
    table = json.loads(arguments.tune.read_text()) if arguments.tune.is_file() else {}
    rows = []
    for text in (arguments.shapes or TUNED_SHAPES).split(","):
        shape = tuple(map(int, text.split("x")))
        for pattern in ("16:32", "60 %"):
            _, packed = repeated(
                make((drawn_rows(shape[0]), shape[1]), PATTERNS[pattern], torch.bfloat16), shape[0], device
            )
            count = max(2, min(48, ROTATED_BYTES["cuda"] // packed.spec.nbytes + 1))
            words = [packed.words, *(packed.words.clone() for _ in range(count - 1))]
            for family, tokens in ((FEW, 1), (MANY, 16)):
                tried = list(launches(family, packed.spec.n))
                works = [product_of(shape, tokens, packed, words, family, launch, device) for launch in tried]
                took = rounds(works, count, device, 5)
                best = min(range(len(tried)), key=took.__getitem__)
                row = {"family": family, "kind": kind_of(packed.spec.n), "size": shape, **tried[best]._asdict()}
                rows.append(row)
                slowest = round(max(took), 2)
                print(json.dumps({**row, "us": round(took[best], 2), "slowest_us": slowest}), flush=True)
    table[name] = {"settings": settings(rows, device)._asdict(), "launches": rows}
    print(json.dumps(table[name]["settings"]), flush=True)
    arguments.tune.write_text(as_text(table))


def settings(rows: list[dict[str, Any]], device: str) -> Settings:
    """Return what is best for all matrices on a device, measured with 16:32 at 4096 × 14336 with the fastest launches."""
    from thanos.sparse.kernels.cuda import by_library

    shape = (4096, 14336)
    _, packed = repeated(make((1024, shape[1]), 0.0, torch.bfloat16), shape[0], device)
    words = [packed.words, *(packed.words.clone() for _ in range(7))]
    here = [row for row in rows if (row["size"], row["kind"]) == (shape, "to16")]
    best = {row["family"]: Launch(row["flight"], row["splits"], row["warps"]) for row in here}

    def library(tokens: int, expanded: int) -> Callable[[int], Any]:
        x = torch.randn(tokens, shape[1]).to(device, torch.bfloat16)
        return lambda i: by_library(x, words[i], None, None, shape[0], packed.spec.n, expanded)

    def kernel(family: str, tokens: int) -> Callable[[int], Any]:
        return product_of(shape, tokens, packed, words, family, best[family], device)

    sizes = [8 << 20, 16 << 20, 32 << 20, Settings().expanded_bytes]
    took = rounds([library(2048, size) for size in sizes], len(words), device, 5)
    print(json.dumps({"tokens": 2048, "expanded_bytes": sizes, "us": [round(one, 1) for one in took]}), flush=True)
    expanded = sizes[min(range(len(sizes)), key=took.__getitem__)]
    few_tokens, most_tokens = 0, 16
    for tokens in (1, 2, 4):
        few, many = rounds([kernel(FEW, tokens), kernel(MANY, tokens)], len(words), device, 9)
        print(json.dumps({"tokens": tokens, FEW: round(few, 2), MANY: round(many, 2)}), flush=True)
        few_tokens = tokens if few < 0.97 * many else few_tokens
    for tokens in (32, 48, 64, 96, 128):
        many, theirs = rounds([kernel(MANY, tokens), library(tokens, expanded)], len(words), device, 9)
        print(json.dumps({"tokens": tokens, MANY: round(many, 2), "library": round(theirs, 2)}), flush=True)
        most_tokens = tokens if many < theirs else most_tokens
    return Settings(few_tokens, most_tokens, expanded)


def as_text(table: dict[str, Any]) -> str:
    """Return the JSON with a line for each launch."""
    parts = []
    for name, one in table.items():
        launches = ",\n".join(f"   {json.dumps(row)}" for row in one["launches"])
        head = f' {json.dumps(name)}: {{\n  "settings": {json.dumps(one["settings"])},\n'
        parts.append(f'{head}  "launches": [\n{launches}\n  ]\n }}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def product_of(
    shape: tuple[int, ...],
    tokens: int,
    packed: PackedWeight,
    words: list[Tensor],
    family: str,
    launch: Launch,
    device: str,
) -> Callable[[int], Any]:
    """Return the product by one kernel with one division of its work."""
    from thanos.sparse.kernels.cuda import multiply

    x = torch.randn(tokens, shape[1]).to(device, torch.bfloat16)
    n = packed.spec.n
    return lambda i: multiply(x, [words[i]], [packed.offsets], [None], [shape[0]], n, family, launch)


@torch.inference_mode()
def main() -> int:
    """Measure all shapes and patterns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", default="1")
    parser.add_argument("--shapes")
    parser.add_argument("--patterns", default=",".join(PATTERNS))
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--tune", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.tune is not None:
        tune(arguments)
        return 0
    shapes = arguments.shapes or SHAPES[torch.device(arguments.device).type]
    environment = machine(arguments.device)
    print(json.dumps(environment), flush=True)
    for text in shapes.split(","):
        rows, columns = map(int, text.split("x"))
        for pattern, tokens in itertools.product(arguments.patterns.split(","), arguments.tokens.split(",")):
            row = measure((rows, columns), pattern, int(tokens), arguments)
            print(json.dumps(row), flush=True)
            if arguments.results is not None:
                with arguments.results.open("a") as file:
                    file.write(json.dumps(row | {"machine": environment}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
