"""Write a GGUF file of random quantised weights: a Qwen2 of any size.

    python benchmarks/make_gguf.py FILE

The default sizes are those of Qwen2.5-Coder-1.5B, with a head apart from the embedding, as files of that model have it. The
matrices are in Q4_1, the head is in Q8_0. The tokenizer has as many tokens and merges as the vocabulary needs.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np

from thanos.errors import ResourceError
from thanos.system.extras import install_command

HEAD_DIM = 128
BLOCK = 32
"""Number of weights that share a scale."""


def write(file: Path, sizes: argparse.Namespace) -> None:
    """Write the file.

    Args:
        file: file to write.
        sizes: ``hidden``, ``intermediate``, ``blocks``, ``kv_heads`` and ``vocabulary``; the hidden size is a multiple of
            :data:`HEAD_DIM`, the intermediate size one of :data:`BLOCK`.

    Raises:
        ResourceError: the package gguf is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ResourceError(f"GGUF files need the package gguf; install it with: {install_command('gguf')}") from error
    writer, draw = gguf.GGUFWriter(str(file), "qwen2", use_temp_file=True), np.random.default_rng(0)
    _metadata(writer, sizes)
    for name, rows, columns in _matrices(sizes):
        kind = "Q8_0" if name == "output" else "Q4_1"
        values = _head(draw, rows, columns) if name == "output" else _matrix(draw, rows, columns)
        writer.add_tensor(f"{name}.weight", values, raw_dtype=gguf.GGMLQuantizationType[kind])
    for name, length, value in _vectors(sizes):
        writer.add_tensor(name, np.full(length, value, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _matrices(sizes: argparse.Namespace) -> list[tuple[str, int, int]]:
    """Return name, rows and columns of each matrix."""
    hidden, wide, narrow = sizes.hidden, sizes.intermediate, sizes.kv_heads * HEAD_DIM
    block = {
        "attn_q": (hidden, hidden),
        "attn_k": (narrow, hidden),
        "attn_v": (narrow, hidden),
        "attn_output": (hidden, hidden),
        "ffn_gate": (wide, hidden),
        "ffn_up": (wide, hidden),
        "ffn_down": (hidden, wide),
    }
    inner = [(f"blk.{index}.{name}", *shape) for index in range(sizes.blocks) for name, shape in block.items()]
    return [("token_embd", sizes.vocabulary, hidden), *inner, ("output", sizes.vocabulary, hidden)]


def _vectors(sizes: argparse.Namespace) -> list[tuple[str, int, float]]:
    """Return name, length and value of each vector: norms of one, and biases of zero."""
    narrow = sizes.kv_heads * HEAD_DIM
    vectors = [("output_norm.weight", sizes.hidden, 1.0)]
    for index in range(sizes.blocks):
        vectors += [(f"blk.{index}.{name}_norm.weight", sizes.hidden, 1.0) for name in ("attn", "ffn")]
        lengths = {"q": sizes.hidden, "k": narrow, "v": narrow}
        vectors += [(f"blk.{index}.attn_{name}.bias", length, 0.0) for name, length in lengths.items()]
    return vectors


def _matrix(draw: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Return a matrix in Q4_1: for every block a scale and a minimum in float16, then 4 bits for each weight."""
    number = rows * columns // BLOCK
    scale = np.tile(np.array([0.005, -0.0375], np.float16).view(np.uint8), (number, 1))
    weights = draw.integers(0, 256, (number, BLOCK // 2), dtype=np.uint8)
    return np.concatenate([scale, weights], axis=1).reshape(rows, -1)


def _head(draw: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Return a matrix in Q8_0: for every block a scale in float16, then 8 bits for each weight."""
    number = rows * columns // BLOCK
    scale = np.tile(np.array([0.0003], np.float16).view(np.uint8), (number, 1))
    return np.concatenate([scale, draw.integers(0, 256, (number, BLOCK), dtype=np.uint8)], axis=1).reshape(rows, -1)


def _metadata(writer: Any, sizes: argparse.Namespace) -> None:
    """Write the config, and a tokenizer of bytes whose merges make pairs and triples of bytes until the vocabulary is full."""
    from tokenizers.pre_tokenizers import ByteLevel

    writer.add_context_length(32768)
    writer.add_embedding_length(sizes.hidden)
    writer.add_block_count(sizes.blocks)
    writer.add_feed_forward_length(sizes.intermediate)
    writer.add_head_count(sizes.hidden // HEAD_DIM)
    writer.add_head_count_kv(sizes.kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    letters = sorted(ByteLevel.alphabet())
    # transformers adds the second, and release 5.17 the third, if it is missing.
    words = ["<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters]
    pairs = itertools.product(letters, letters)
    triples = ((first + second, third) for first, second, third in itertools.product(letters, repeat=3))
    merges = list(itertools.islice(itertools.chain(pairs, triples), sizes.vocabulary - len(words)))
    words += ["".join(merge) for merge in merges]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_token_types([2, 3, 3, 3, *[1] * (len(words) - 4)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(3)
    writer.add_unk_token_id(0)


def main() -> int:
    """Write the file of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    for name, value in {
        "hidden": 1536,
        "intermediate": 8960,
        "blocks": 28,
        "kv-heads": 2,
        "vocabulary": 151_936,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default: {value}")
    given = parser.parse_args()
    try:
        write(given.file, given)
    except ResourceError as error:
        raise SystemExit(str(error)) from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
