r"""Write a Llama-style checkpoint of random bfloat16 weights, one tensor in memory at a time.

    python benchmarks/make_checkpoint.py FOLDER --hidden 1024 --intermediate 2816 --heads 8 --kv-heads 8 --blocks 64 \
        --vocabulary 4096

A tokenizer of one token a number goes with it, and ``numbers.txt`` beside the folder: text to calibrate on.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

from thanos.bench.synthetic import SHAPES, Shape, write_checkpoint


def write_text(path: Path, vocabulary: int, tokens: int, *, seed: int = 0) -> Path:
    """Write so many random numbers below the vocabulary's size: one token each."""
    draw = random.Random(seed)
    path.write_text(" ".join(str(draw.randrange(2, vocabulary)) for _ in range(tokens)), encoding="utf-8")
    return path


def main() -> None:
    """Write what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), help="a known model's sizes, instead of the next ones")
    for name, default in (
        ("hidden", 1024), ("intermediate", 2816), ("heads", 8), ("kv-heads", 8), ("blocks", 4), ("vocabulary", 4096),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", type=int, default=20_000, help="of the text")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    shape = SHAPES.get(given.shape) or Shape(
        hidden=given.hidden,
        intermediate=given.intermediate,
        heads=given.heads,
        kv_heads=given.kv_heads,
        blocks=given.blocks,
        vocabulary=given.vocabulary,
    )
    size = write_checkpoint(given.folder, shape, seed=given.seed)
    text = write_text(given.folder.parent / "numbers.txt", shape.vocabulary, given.tokens, seed=given.seed)
    sys.stdout.write(f"{given.folder}: {size / 2**30:.2f} GiB; text: {text}\n")


if __name__ == "__main__":
    main()
