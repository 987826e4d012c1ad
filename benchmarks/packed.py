"""Time the product of packed matrices and torch's dense product, on random weights that are larger than the caches.

    python benchmarks/packed.py [--device cuda] [--tokens 1,16] [--shapes 4096x4096,4096x14336] [--results FILE]
    python benchmarks/packed.py --tune src/thanos/sparse/kernels/tuned.json

The script prints one JSON line for each shape, pattern and number of tokens: microseconds of both products, their ratio, the
fraction of bytes, and the relative error. On CUDA the products are captured as a CUDA graph. Dense and packed rounds alternate.
On a CPU the dense product by ``thanos.sparse.kernels.dense`` is timed too, if that kernel supports the number of tokens.

``--tune`` (CUDA) times several launches (tiles in flight, parts of the columns, warps per block) of each kernel for every
shape, and writes the fastest into the file, after each shape.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from packed_weights import PATTERNS, Weights, weights
from torch import Tensor
from torch.nn import functional as F

from thanos.bench.measure import machine, synchronize
from thanos.sparse.formats import PackedWeight
from thanos.sparse.kernels import dense as dense_kernel
from thanos.sparse.kernels.tuned import FEW, MANY, Launch, Settings, kind_of
from thanos.sparse.ops import packed_linear
from thanos.sparse.tiles import UNIT

SHAPES = {
    "cuda": "6144x4096,4096x4096,28672x4096,4096x14336,8192x28672",
    "cpu": "576x576,1536x576,4864x896,4096x4096,14336x4096,4096x14336",
}

TUNED_SHAPES = "1024x4096,4096x4096,6144x4096,14336x4096,28672x4096,4096x14336,8192x28672"

TUNED_PATTERNS = ("16:32", "50 %", "60 %", "70 %")
"""Patterns that are tuned. A matrix later uses the results of its kind (``kind_of``). Of the results for the nearest size, it
uses the one whose tiles have the nearest number of units."""

TRIED_PARTS = (1, 2, 4)
"""Numbers of parts that are tried, in which a matrix is expanded and multiplied."""

PARTS_GAIN = 0.99
"""More parts are chosen only if they take less than this fraction of the time of fewer parts."""

SETTINGS_SHAPE = (4096, 14336)
"""Size at which the settings of a device are measured."""

_GRAPH_CALLS = 16
"""Least number of calls in a CUDA graph, so that the gap between two graphs is negligible."""

_ROUND_SECONDS = 0.005
"""Least seconds of a timed round, so that waiting for the device is negligible."""


def rounds(works: list[Callable[[int], Any]], count: int, device: str, repeats: int) -> list[float]:
    """Return the median microseconds of one call of each work, over rounds in which the works alternate.

    Args:
        works: functions of an index from 0 to count − 1. Successive calls use successive indices, cyclically.
        count: number of indices.
        device: device of the works. On CUDA the calls are captured as a graph.
        repeats: number of rounds.
    """
    cuda = torch.device(device).type == "cuda"
    calls = max(count, _GRAPH_CALLS) if cuda else count

    def all_calls(work: Callable[[int], Any]) -> Callable[[], None]:
        def run() -> None:
            for index in range(calls):
                work(index % count)

        return run

    runs = [all_calls(work) for work in works]
    for run in runs:
        run()  # compiles, and lets the library choose
    if cuda:
        graphs = [torch.cuda.CUDAGraph() for _ in runs]
        for graph, run in zip(graphs, runs, strict=True):
            with torch.cuda.graph(graph):
                run()
        runs = [graph.replay for graph in graphs]

    def seconds(run: Callable[[], None], times: int) -> float:
        synchronize(device)
        began = time.perf_counter()
        for _ in range(times):
            run()
        synchronize(device)
        return (time.perf_counter() - began) / times

    times = [1 + int(_ROUND_SECONDS / min(seconds(run, 1) for _ in range(2))) for run in runs]
    took: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, often, each in zip(runs, times, took, strict=True):
            each.append(seconds(run, often))
    return [1e6 * statistics.median(each) / calls for each in took]


def measure(shape: tuple[int, int], pattern: str, tokens: int, held: Weights, arguments: Namespace) -> dict[str, Any]:
    """Return the figures of one shape, pattern and number of tokens."""
    device, (dense, packed, words) = arguments.device, held
    x = torch.randn(tokens, shape[1]).to(device, dense[0].dtype)
    rest = (packed.offsets, None, shape[0], packed.spec.n)
    exact = x[:16].double() @ dense[0].double().T
    error = (packed_linear(x, words[0], *rest)[:16].double() - exact).norm() / exact.norm()
    del exact
    works: list[Callable[[int], Any]] = [lambda i: F.linear(x, dense[i]), lambda i: packed_linear(x, words[i], *rest)]
    if x.device.type == "cpu" and dense_kernel.serves(x, dense[0]):
        works.append(lambda i: dense_kernel.linear(x, dense[i], None))
    theirs, ours, *by_kernel = rounds(works, len(words), device, arguments.repeats)
    return {
        "shape": f"{shape[0]}x{shape[1]}",
        "pattern": pattern,
        "tokens": tokens,
        "dense_us": round(theirs, 2),
        "packed_us": round(ours, 2),
        "dense_kernel_us": round(by_kernel[0], 2) if by_kernel else None,
        "ratio": round(theirs / ours, 3),
        "bytes": round(packed.spec.nbytes / packed.spec.dense_bytes, 4),
        "gb_per_s": round(packed.spec.nbytes / ours / 1e3, 1),
        "error": float(f"{error.item():.2e}"),
    }


def sizes(text: str) -> list[tuple[int, int]]:
    """Return (rows, columns) of each size in a list such as ``4096x4096,4096x14336``."""
    pairs = (one.split("x") for one in text.split(","))
    return [(int(rows), int(columns)) for rows, columns in pairs]


def launches(family: str, n: int) -> Iterator[Launch]:
    """Yield the launches of a kernel that are tried."""
    for flight in (1, 2, 4) if family == FEW and 0 < n <= 16 else (1, 2):
        for splits in (1, 2, 4):
            for warps in (4, 8, 16) if family == FEW else (4, 8):
                yield Launch(flight, splits, warps)


def tune(arguments: Namespace) -> None:
    """Time all launches for all shapes, and write the fastest into the file, again after each shape."""
    device, file = arguments.device, arguments.tune
    name = torch.cuda.get_device_name(torch.device(device))
    table = json.loads(file.read_text()) if file.is_file() else {}
    shapes = sizes(arguments.shapes or TUNED_SHAPES)
    about = machine(device)
    measured = {"commit": about["commit"], "date": about["date"], "torch": about["versions"]["torch"]}
    rows: list[dict[str, Any]] = []
    for shape in [*shapes, *([] if SETTINGS_SHAPE in shapes else [SETTINGS_SHAPE])]:
        for pattern in TUNED_PATTERNS:
            _, packed, words = weights(shape, pattern, torch.bfloat16, device, dense=False)
            for family, tokens in ((FEW, 1), (MANY, 16)):
                tried = list(launches(family, packed.spec.n))
                works = [product_of(shape, tokens, packed, words, family, launch, device) for launch in tried]
                took = rounds(works, len(words), device, 5)
                best = min(range(len(tried)), key=took.__getitem__)
                units = packed.spec.words // (UNIT * packed.spec.strips * packed.spec.tiles)
                kind = {"family": family, "kind": kind_of(packed.spec.n), "units": units}
                row = {**kind, "size": shape, **tried[best]._asdict()}
                rows.append(row)
                slowest = round(max(took), 2)
                print(json.dumps({**row, "us": round(took[best], 2), "slowest_us": slowest}), flush=True)
        table[name] = {"measured": measured, "settings": Settings()._asdict(), "launches": rows}
        file.write_text(as_text(table))
    table[name]["settings"] = settings(rows, device)._asdict()
    print(json.dumps(table[name]["settings"]), flush=True)
    file.write_text(as_text(table))


def settings(rows: list[dict[str, Any]], device: str) -> Settings:
    """Return the best settings for all matrices on a device, measured with 16:32 at one size with the fastest launches."""
    from thanos.sparse.kernels.cuda import by_library

    shape = SETTINGS_SHAPE
    _, packed, words = weights(shape, "16:32", torch.bfloat16, device, dense=False)
    here = [row for row in rows if (row["size"], row["kind"]) == (shape, kind_of(packed.spec.n))]
    best = {row["family"]: Launch(row["flight"], row["splits"], row["warps"]) for row in here}

    def library(tokens: int, parts: int) -> Callable[[int], Any]:
        x = torch.randn(tokens, shape[1]).to(device, torch.bfloat16)
        return lambda i: by_library(x, words[i], None, None, shape[0], packed.spec.n, parts)

    def kernel(family: str, tokens: int, most: int = 16) -> Callable[[int], Any]:
        return product_of(shape, tokens, packed, words, family, best[family], device, most)

    took = dict(
        zip(TRIED_PARTS, rounds([library(2048, one) for one in TRIED_PARTS], len(words), device, 9), strict=True)
    )
    print(json.dumps({"tokens": 2048, "parts": {one: round(us, 1) for one, us in took.items()}}), flush=True)
    parts = 1
    for one, us in took.items():
        parts = one if us < PARTS_GAIN * took[parts] else parts
    few_tokens, most_tokens = 0, 16
    for tokens in (1, 2, 4):
        few, many = rounds([kernel(FEW, tokens), kernel(MANY, tokens)], len(words), device, 9)
        print(json.dumps({"tokens": tokens, FEW: round(few, 2), MANY: round(many, 2)}), flush=True)
        if few > 0.97 * many:
            break
        few_tokens = tokens
    passes = (16, 32)
    took = dict(zip(passes, rounds([kernel(MANY, 32, most) for most in passes], len(words), device, 9), strict=True))
    print(json.dumps({"tokens": 32, "pass_tokens": {one: round(us, 1) for one, us in took.items()}}), flush=True)
    pass_tokens = min(passes, key=took.__getitem__)
    for tokens in (32, 48, 64, 96, 128):
        many, theirs = rounds([kernel(MANY, tokens, pass_tokens), library(tokens, 1)], len(words), device, 9)
        print(json.dumps({"tokens": tokens, MANY: round(many, 2), "library": round(theirs, 2)}), flush=True)
        if many > theirs:
            break
        most_tokens = tokens
    return Settings(few_tokens, most_tokens, parts, pass_tokens)


def as_text(table: dict[str, Any]) -> str:
    """Return the JSON with a line for each launch."""
    parts = []
    for name, one in table.items():
        launches = ",\n".join(f"   {json.dumps(row)}" for row in one["launches"])
        head = "".join(f"  {json.dumps(key)}: {json.dumps(one[key])},\n" for key in one if key != "launches")
        parts.append(f' {json.dumps(name)}: {{\n{head}  "launches": [\n{launches}\n  ]\n }}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def product_of(
    shape: tuple[int, int],
    tokens: int,
    packed: PackedWeight,
    words: list[Tensor],
    family: str,
    launch: Launch,
    device: str,
    most: int = 16,
) -> Callable[[int], Any]:
    """Return a function that multiplies by one kernel with one launch."""
    from thanos.sparse.kernels.cuda import multiply

    x = torch.randn(tokens, shape[1]).to(device, torch.bfloat16)
    n = packed.spec.n
    return lambda i: multiply(x, [words[i]], [packed.offsets], [None], [shape[0]], n, family, launch, most)


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
    dtype, device = getattr(torch, arguments.dtype), arguments.device
    environment = machine(device)
    print(json.dumps(environment), flush=True)
    for shape in sizes(arguments.shapes or SHAPES[torch.device(device).type]):
        for pattern in arguments.patterns.split(","):
            held = weights(shape, pattern, dtype, device)
            for tokens in map(int, arguments.tokens.split(",")):
                row = measure(shape, pattern, tokens, held, arguments)
                print(json.dumps(row), flush=True)
                if arguments.results is not None:
                    with arguments.results.open("a") as file:
                        file.write(json.dumps(row | {"machine": environment}) + "\n")
            del held
    return 0


if __name__ == "__main__":
    sys.exit(main())
