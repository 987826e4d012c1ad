r"""Write a checkpoint of random bfloat16 weights: Llama-style, one tensor in memory at a time, or of any config.

    python benchmarks/make_checkpoint.py FOLDER --hidden 1024 --intermediate 2816 --heads 8 --kv-heads 8 --blocks 64 \
        --vocabulary 4096
    python benchmarks/make_checkpoint.py FOLDER --config studies/opt-125m.json --tokenizer MODEL

With sizes, the checkpoint gets a tokenizer with one token per number, and a text for calibration is written to ``numbers.txt``
next to the folder. With ``--config``, transformers initialises the weights, and the tokenizer is that of another model (a
folder or a GGUF file), so that real text can be used for calibration.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch

from thanos.bench.synthetic import SHAPES, Shape, random_checkpoint
from thanos.checkpoint.in_memory import raw_bytes
from thanos.checkpoint.weight_files import INDEX_NAME
from thanos.model.source import resolve_model


def write_text(path: Path, vocabulary: int, tokens: int, *, seed: int = 0) -> Path:
    """Write ``tokens`` random numbers below the vocabulary's size, one token each; return the path."""
    draw = random.Random(seed)
    path.write_text(" ".join(str(draw.randrange(2, vocabulary)) for _ in range(tokens)), encoding="utf-8")
    return path


def write_checkpoint(folder: Path, shape: Shape, *, length: int = 2048, seed: int = 0) -> int:
    """Write a checkpoint of random weights, with a tokenizer that has one token per number; return the bytes of the weights.

    One tensor is in memory at a time. ``length`` is the longest sequence, in tokens.
    """
    meta_model, checkpoint = random_checkpoint(shape, length, seed=seed, keep=False)
    folder.mkdir(parents=True, exist_ok=True)
    meta_model.config.save_pretrained(folder)
    write_tokenizer(folder, shape.vocabulary)
    for shard in checkpoint.layout.shards:
        names = [name for name, info in checkpoint.tensors.items() if info.shard == shard.name]
        with (folder / shard.name).open("wb") as file:
            file.write(shard.header)
            for name in sorted(names, key=lambda name: checkpoint.tensors[name].offset):
                file.write(raw_bytes(checkpoint.read(name)))
            file.flush()
            # Drop the file from the page cache, so that a later benchmark reads the disk.
            if hasattr(os, "posix_fadvise"):
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if checkpoint.layout.index is not None:
        (folder / INDEX_NAME).write_bytes(checkpoint.layout.index)
    return checkpoint.layout.nbytes


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Write a tokenizer with one token for every integer from 0 to ``vocabulary`` - 1, so that numbers are valid text."""
    words = {str(number): number for number in range(vocabulary)}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "0"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "1", "unk_token": "0"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def write_initial(folder: Path, config: Path, tokenizer: Path, *, seed: int = 0) -> int:
    """Write a causal LM as transformers initialises it, with another model's tokenizer.

    Args:
        folder: folder to write.
        config: file with the config as JSON; ``model_type`` is one of its keys.
        tokenizer: model whose tokenizer is copied.
        seed: seed of the weights.

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
    """Write a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), help="a known model's sizes, in place of the size options")
    for name, default in (
        ("hidden", 1024), ("intermediate", 2816), ("heads", 8), ("kv-heads", 8), ("blocks", 4), ("vocabulary", 4096),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", type=int, default=20_000, help="number of tokens in the text")
    parser.add_argument("--config", type=Path, help="a model's config.json, instead of sizes; needs --tokenizer")
    parser.add_argument("--tokenizer", type=Path, help="a model's folder or GGUF file")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if (options.config is None) != (options.tokenizer is None):
        parser.error("give both --config and --tokenizer, or neither")
    if options.config is not None:
        size = write_initial(options.folder, options.config, options.tokenizer, seed=options.seed)
        sys.stdout.write(f"{options.folder}: {size / 2**30:.2f} GiB\n")
        return
    shape = SHAPES.get(options.shape) or Shape(
        hidden=options.hidden,
        intermediate=options.intermediate,
        heads=options.heads,
        kv_heads=options.kv_heads,
        blocks=options.blocks,
        vocabulary=options.vocabulary,
    )
    size = write_checkpoint(options.folder, shape, seed=options.seed)
    text = write_text(options.folder.parent / "numbers.txt", shape.vocabulary, options.tokens, seed=options.seed)
    sys.stdout.write(f"{options.folder}: {size / 2**30:.2f} GiB; text: {text}\n")


if __name__ == "__main__":
    main()
