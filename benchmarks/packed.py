"""Time the product of packed matrices beside torch's dense one, on random weights that no cache holds.

    python benchmarks/packed.py [--device cuda] [--tokens 1] [--shapes 4096x4096,4096x14336] [--results FILE]

Prints one JSON line for each shape and pattern: microseconds of both products, their ratio, the fraction of bytes, and the
relative error. On CUDA all products of a round are one CUDA graph. Dense and packed rounds alternate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from thanos.bench.measure import machine, synchronize
from thanos.sparse.formats import encode
from thanos.sparse.ops import packed_linear

PATTERNS = {"16:32": 0.0, "50 %": 0.5, "60 %": 0.6, "70 %": 0.7}
"""Pattern → sparsity of one without a pattern; 0 for 16:32."""

SHAPES = {
    "cuda": "6144x4096,4096x4096,28672x4096,4096x14336,8192x28672",
    "cpu": "576x576,1536x576,4864x896,4096x4096,14336x4096,4096x14336",
}

ROTATED_BYTES = {"cuda": 3 << 27, "cpu": 3 << 26}
"""Bytes of packed weights among which the products rotate: more than the last cache."""


def make(shape: tuple[int, int], sparsity: float, dtype: torch.dtype) -> Tensor:
    """Return random weights in a pattern."""
    weight = torch.randn(shape)
    if sparsity:
        return weight.masked_fill(torch.rand(shape) < sparsity, 0).to(dtype)
    rank = torch.rand(shape[0], shape[1] // 32, 32).argsort(-1).argsort(-1)
    return weight.masked_fill((rank >= 16).view(shape), 0).to(dtype)


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


def measure(shape: tuple[int, int], pattern: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one shape and pattern."""
    dtype = getattr(torch, arguments.dtype)
    weight = make(shape, PATTERNS[pattern], dtype)
    packed = encode(weight)
    rotated = ROTATED_BYTES[torch.device(arguments.device).type]
    count = max(2, min(48, rotated // packed.spec.nbytes + 1))
    dense = [weight.to(arguments.device, copy=True) for _ in range(count)]
    words = [packed.words.to(arguments.device, copy=True) for _ in range(count)]
    offsets = None if packed.offsets is None else packed.offsets.to(arguments.device)
    x = torch.randn(arguments.tokens, shape[1]).to(arguments.device, dtype)
    rest = (offsets, None, shape[0], packed.spec.n)
    exact = x.double() @ dense[0].double().T
    error = (packed_linear(x, words[0], *rest).double() - exact).norm() / exact.norm()
    theirs, ours = rounds(
        [lambda i: F.linear(x, dense[i]), lambda i: packed_linear(x, words[i], *rest)],
        count,
        arguments.device,
        arguments.repeats,
    )
    return {
        "shape": f"{shape[0]}x{shape[1]}",
        "pattern": pattern,
        "tokens": arguments.tokens,
        "dense_us": round(theirs, 2),
        "packed_us": round(ours, 2),
        "ratio": round(theirs / ours, 3),
        "bytes": round(packed.spec.nbytes / packed.spec.dense_bytes, 4),
        "error": float(f"{error.item():.2e}"),
    }


@torch.inference_mode()
def main() -> int:
    """Measure all shapes and patterns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--shapes")
    parser.add_argument("--patterns", default=",".join(PATTERNS))
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    shapes = arguments.shapes or SHAPES[torch.device(arguments.device).type]
    environment = machine(arguments.device)
    print(json.dumps(environment), flush=True)
    for text in shapes.split(","):
        rows, columns = map(int, text.split("x"))
        for pattern in arguments.patterns.split(","):
            row = measure((rows, columns), pattern, arguments)
            print(json.dumps(row), flush=True)
            if arguments.results is not None:
                with arguments.results.open("a") as file:
                    file.write(json.dumps(row | {"machine": environment}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
