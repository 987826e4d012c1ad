"""Models of a given shape with random weights, which are generated when they are read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thanos.checkpoint.in_memory import raw_bytes
from thanos.checkpoint.layout import CHUNK_ENTRIES, Layout, TensorInfo, TensorSpec, plan_layout
from thanos.errors import RecipeError
from thanos.model.meta_model import build_meta_model, persistent_tensors

_BASE = 4_194_301
"""Number of random numbers, which all tensors repeat. It is prime, so no two rows of a matrix are equal."""

_SHARD_BYTES = 5 * 10**9
"""Size in bytes above which the planned files are split into shards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes of a Llama-style model.

    Attributes:
        hidden: width of the hidden states.
        intermediate: width inside the MLP.
        heads: number of attention heads; divides ``hidden``.
        kv_heads: number of key-value heads; divides ``heads``.
        blocks: number of decoder blocks.
        vocabulary: number of tokens in the vocabulary.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    blocks: int
    vocabulary: int

    def __post_init__(self) -> None:
        values = {name: getattr(self, name) for name in self.__slots__}
        if min(values.values()) < 1 or self.hidden % self.heads or self.heads % self.kv_heads:
            given = ", ".join(f"{name} {value}" for name, value in values.items())
            raise RecipeError(
                "hidden must be a multiple of heads, heads must be a multiple of kv_heads, and every size must be at least 1; "
                f"got {given}"
            )

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of each linear layer of a block, in calling order."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "q_proj": (self.hidden, self.hidden),
            "k_proj": (kv, self.hidden),
            "v_proj": (kv, self.hidden),
            "o_proj": (self.hidden, self.hidden),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }

    def config(self, length: int) -> Any:
        """Return the model's transformers config, for sequences of up to ``length`` tokens."""
        from transformers import LlamaConfig

        config = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            num_hidden_layers=self.blocks,
            vocab_size=self.vocabulary,
            max_position_embeddings=max(length, 2048),
            tie_word_embeddings=False,
        )
        config.architectures = ["LlamaForCausalLM"]
        config.dtype = torch.bfloat16
        return config


SHAPES = {
    "llama-3-8b": Shape(hidden=4096, intermediate=14336, heads=32, kv_heads=8, blocks=32, vocabulary=128256),
    "llama-3-70b": Shape(hidden=8192, intermediate=28672, heads=64, kv_heads=8, blocks=80, vocabulary=128256),
    "llama-3-405b": Shape(hidden=16384, intermediate=53248, heads=128, kv_heads=8, blocks=126, vocabulary=128256),
    "llama-2-7b": Shape(hidden=4096, intermediate=11008, heads=32, kv_heads=32, blocks=32, vocabulary=32000),
    "smollm2-135m": Shape(hidden=576, intermediate=1536, heads=9, kv_heads=3, blocks=30, vocabulary=49152),
}


class RandomCheckpoint:
    """A :class:`~thanos.checkpoint.layout.Checkpoint` of random tensors: weights of variance 1 / columns, norms of ones.

    A tensor is generated when it is read. Tensors of the same shape and dtype are equal.

    Args:
        tensors: name → meta tensor with the shape and dtype.
        seed: seed of the random numbers.
        keep: keep one tensor of each shape and dtype in memory, so that a second read is fast. Otherwise only the last tensor
            is kept.

    Attributes:
        layout: planned layout of the files.
    """

    def __init__(self, tensors: dict[str, Tensor], *, seed: int = 0, keep: bool = True) -> None:
        specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        self.layout: Layout = plan_layout(specs, _SHARD_BYTES)
        generator = torch.Generator().manual_seed(seed)
        self._base = torch.randn(_BASE, generator=generator)
        self._keep = keep
        self._made: dict[tuple[tuple[int, ...], torch.dtype], Tensor] = {}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name → dtype, shape, and bytes in the planned files."""
        return self.layout.tensors

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU. Do not modify it."""
        info = self.tensors[name]
        key = info.shape, info.dtype
        if key not in self._made:
            if not self._keep:
                self._made.clear()
            self._made[key] = self._make(info.shape, info.dtype)
        return self._made[key]

    def entries(self, name: str, first: int, count: int) -> Tensor:
        """Return consecutive entries of a tensor, flat."""
        return self.read(name).reshape(-1)[first : first + count]

    def chunks(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor's entries in order, in flat chunks."""
        yield from self.read(name).reshape(-1).split(CHUNK_ENTRIES)

    def raw_spans(self, name: str) -> Iterator[memoryview]:
        """Yield a tensor's bytes."""
        yield raw_bytes(self.read(name))

    def split(self, name: str, parts: Mapping[str, tuple[int, ...]]) -> None:
        """See :meth:`Checkpoint.split <thanos.checkpoint.layout.Checkpoint.split>`. Each part is then a separate tensor."""
        self.layout.split(name, parts)

    def _make(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        made = torch.empty(shape, dtype=dtype)
        if len(shape) == 1:
            return made.fill_(1)
        flat, base = made.view(-1), (self._base / math.sqrt(shape[-1])).to(dtype).roll(sum(shape))
        for part in flat.split(_BASE):
            part.copy_(base[: len(part)])
        return made


def random_checkpoint(shape: Shape, length: int, *, seed: int = 0, keep: bool = True) -> tuple[Any, RandomCheckpoint]:
    """Return a bfloat16 meta model of the shape, and the checkpoint of its tensors; ``length`` as in :meth:`Shape.config`."""
    meta_model = build_meta_model(shape.config(length), torch.bfloat16)
    return meta_model, RandomCheckpoint(dict(persistent_tensors(meta_model)), seed=seed, keep=keep)
