"""The tensors of a GGUF file that hold a model's tensors, by the tables of the gguf package and of transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from thanos.checkpoint.gguf_checkpoint import GGUFCheckpoint, Piece, check_kind
from thanos.checkpoint.gguf_header import GGUFHeader, StoredTensor
from thanos.model.experts import PARTS, Experts
from thanos.model.meta_model import named_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BY_BLOCK = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "qwen2moe", "qwen3moe")
"""Architectures, by their names in the format, whose tensors are read one by one. ``llama`` includes Mistral and Mixtral."""

_DUPLICATE = 0.3
"""Squared relative distance below which two matrices count as the same weights in different quantisations. For Gaussian
weights the distance is 0.007 in Q4_0 and 0.11 after rounding to 2 bits in blocks of 16. Independent matrices have 2."""

_COMPARED = 1 << 18
"""Number of entries that are compared."""


def gguf_checkpoint(header: GGUFHeader, model: PreTrainedModel) -> GGUFCheckpoint | None:
    """Return the tensors of a model in a GGUF file, with names and values as transformers would load them.

    Args:
        header: header of the file.
        model: a meta model of the file's config. Its experts may be fused or not; the tensors are those of the fused model.

    Returns:
        float32 tensors, or None if transformers has to load the file: the architecture is not one of :data:`BY_BLOCK`, a
        parameter has no tensor, or one of another shape.

    Raises:
        ModelError: the gguf package cannot dequantise a tensor.
    """
    stated = (header.metadata.get(f"{header.architecture}.attention.{key}") for key in ("head_count", "head_count_kv"))
    counts = [count for count in stated if isinstance(count, int)]
    if header.architecture not in BY_BLOCK or len(counts) != 2:
        return None
    mapping = _Mapping(header, model, counts)
    shapes, pieces = _stored_shapes(model), {}
    for name, shape in shapes.items():
        found = mapping.pieces(name, shape)
        if found is None:
            return None
        pieces[name] = found
    for tensor in {piece.tensor.kind: piece.tensor for own in pieces.values() for piece in own}.values():
        check_kind(tensor)
    return GGUFCheckpoint(pieces, shapes)


def _stored_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's tensors by name, with the experts of a block fused as transformers fuses them."""
    mixtures = {path: module for path, module in model.named_modules() if isinstance(module, Experts)}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in named_tensors(model):
        path = next((path for path in mixtures if name.startswith(f"{path}.")), None) if mixtures else None
        if path is None:
            shapes[name] = tuple(tensor.shape)
            continue
        for fused, parts in mixtures[path].fused.items():
            rows, columns = sum(shape[0] for shape in parts.values()), next(iter(parts.values()))[1]
            shapes[f"{path}.{fused}"] = (len(mixtures[path]), rows // len(mixtures[path]), columns)
    return shapes


class _Mapping:
    """Finds the tensor of the file for a tensor of the model, and the change that transformers makes to it.

    Args:
        header: header of the file.
        model: the model.
        counts: numbers of attention heads and of key-value heads, as the file states them.
    """

    def __init__(self, header: GGUFHeader, model: PreTrainedModel, counts: Sequence[int]) -> None:
        from gguf import get_tensor_name_map
        from gguf.constants import MODEL_ARCH_NAMES
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        config: Any = model.config
        architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == header.architecture)
        self._tensors = header.tensors
        self._names = get_tensor_name_map(architecture, config.num_hidden_layers)
        heads = dict(zip(("num_attention_heads", "num_key_value_heads"), counts, strict=True))
        self._processor: Any = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=heads)

    def pieces(self, name: str, shape: tuple[int, ...]) -> list[Piece] | None:
        """Return the pieces of one of the model's tensors; None if the file lacks one, or has it in another shape."""
        stem, _, last = name.rpartition(".")
        if len(shape) == 3 and last in PARTS:
            return self._experts([f"{stem}.{part}.weight" for part in PARTS[last]], shape)
        key, tensor = self._find(name)
        if tensor is None or tensor.numel != math.prod(shape):
            return None
        if len(tensor.shape) == 1 and tensor.block[0] != 1:
            return None
        if len(tensor.shape) > 1 and tensor.shape != shape:
            return None
        return self._whole(key, tensor)

    def _find(self, name: str) -> tuple[str, StoredTensor | None]:
        stem, dot, suffix = name.rpartition(".")
        key = f"{self._names.get_name(stem)}{dot}{suffix}"
        return key, self._tensors.get(key)

    def _whole(self, key: str, tensor: StoredTensor) -> list[Piece] | None:
        """Return the piece of a whole tensor, with the change that transformers makes to it.

        The change is a new order of the rows, or an added constant. It is found by letting transformers process a tensor that
        holds the row numbers.
        """
        rows = tensor.shape[0]
        numbers = np.arange(rows, dtype=np.float64).reshape(rows, *[1] * (len(tensor.shape) - 1))
        try:
            made = np.asarray(self._processor.process(weights=numbers, name=key).weights).reshape(-1)
        except (ValueError, ZeroDivisionError):  # the rows do not divide into the file's heads
            return None
        shift = float(made.min())
        order = (made - shift).astype(np.int64)
        if not np.array_equal(np.sort(order), np.arange(rows)):
            return None
        same = np.array_equal(order, np.arange(rows))
        return [Piece(tensor, 0, rows, None if same else order, shift)]

    def _experts(self, names: list[str], shape: tuple[int, ...]) -> list[Piece] | None:
        """Return the pieces of a fused tensor: for each expert its rows in each of the file's stacks."""
        experts, rows, columns = shape
        stacks = [self._find(name)[1] for name in names]
        own = rows // len(names)
        if not all(stack is not None and stack.shape == (experts, own, columns) for stack in stacks):
            return None
        return [Piece(stack, expert * own, own) for expert in range(experts) for stack in stacks if stack is not None]


def untied_note(header: GGUFHeader) -> str | None:
    """Return a note if a file stores its embedding twice, the second time as the head in another quantisation.

    Such a model was tied before it was quantised. transformers does not tie it, since the two differ.
    """
    first, second = header.tensors.get("token_embd.weight"), header.tensors.get("output.weight")
    if first is None or second is None or first.shape != second.shape:
        return None
    rows = min(first.shape[0], max(1, _COMPARED // first.shape[-1]))
    one, other = (Piece(tensor, 0, first.shape[0]).read(0, rows).astype(np.float64) for tensor in (first, second))
    if float(((one - other) ** 2).sum()) > _DUPLICATE * float((one**2).sum()):
        return None
    kinds = f"{first.kind_name} and {second.kind_name}"
    return (
        f"the file stores the embedding twice, as {kinds}, the second time for the head: the two are not tied, so the model "
        f"has {second.numel:,} more parameters than with tied embeddings"
    )
