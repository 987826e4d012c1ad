r"""Write a checkpoint of random bfloat16 weights: Llama-style, one tensor in memory at a time, or of any config.

    python benchmarks/make_checkpoint.py FOLDER --hidden 1024 --intermediate 2816 --heads 8 --kv-heads 8 --blocks 64 \
        --vocabulary 4096
    python benchmarks/make_checkpoint.py FOLDER --config studies/opt-125m.json --tokenizer MODEL

With sizes, a tokenizer of one token a number goes with it, and ``numbers.txt`` beside the folder: text to calibrate on. With
``--config``, the weights are what transformers starts a training from, and the tokenizer is another model's (a folder or a GGUF
file), so that real text can be calibrated on.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch

from thanos.bench.synthetic import SHAPES, Shape, write_checkpoint
from thanos.model.source import resolve_model


def write_text(path: Path, vocabulary: int, tokens: int, *, seed: int = 0) -> Path:
    """Write so many random numbers below the vocabulary's size: one token each."""
    draw = random.Random(seed)
    path.write_text(" ".join(str(draw.randrange(2, vocabulary)) for _ in range(tokens)), encoding="utf-8")
    return path


def write_initial(folder: Path, config: Path, tokenizer: Path, *, seed: int = 0) -> int:
    """Write a causal LM as transformers initialises it, with another model's tokenizer.

    Args:
        folder: where to.
        config: its config as JSON, ``model_type`` among the keys.
        tokenizer: the model whose tokenizer it gets.
        seed: of the weights.

    Returns:
        Bytes of the weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    words = resolve_model(tokenizer).tokenizer()
    settings = AutoConfig.for_model(**json.loads(config.read_text(encoding="utf-8")))
    if len(words) > settings.vocab_size:
        raise SystemExit(f"{tokenizer} has {len(words)} tokens, {config} a vocabulary of {settings.vocab_size}")
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(settings, dtype=torch.float32).to(torch.bfloat16)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


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
    parser.add_argument("--config", type=Path, help="a model's config.json, instead of sizes; needs --tokenizer")
    parser.add_argument("--tokenizer", type=Path, help="a model's folder or GGUF file")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if (given.config is None) != (given.tokenizer is None):
        parser.error("--config and --tokenizer go together")
    if given.config is not None:
        size = write_initial(given.folder, given.config, given.tokenizer, seed=given.seed)
        sys.stdout.write(f"{given.folder}: {size / 2**30:.2f} GiB\n")
        return
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
