"""The header of a GGUF file: metadata, and the location of each tensor.

The gguf package reads headers too, but makes objects of every word of the vocabulary, which takes seconds and hundreds of
megabytes. Here the vocabulary is skipped. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thanos.errors import ModelError

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MOST_SIZES, _MOST_LEVELS = 4, 16
"""Most dimensions of a tensor, by the format, and most levels of nested arrays, which is more than any writer uses."""

_KEPT = "general."
"""Start of the names of the arrays that are kept; others, such as the vocabulary, are skipped."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a GGUF file.

    Attributes:
        path: the file.
        offset: first byte in the file.
        kind: number of the quantisation, a value of the gguf package's ``GGMLQuantizationType``.
        shape: sizes, outermost first as torch has them.
    """

    path: Path
    offset: int
    kind: int
    shape: tuple[int, ...]

    @property
    def block(self) -> tuple[int, int]:
        """Number of entries of a block of the quantisation, and its bytes."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        return GGML_QUANT_SIZES[GGMLQuantizationType(self.kind)]

    @property
    def kind_name(self) -> str:
        """Name of the quantisation, such as Q4_K."""
        from gguf.constants import GGMLQuantizationType

        return GGMLQuantizationType(self.kind).name

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """The content of the header of a GGUF file; for a file in several parts, of all headers together.

    Attributes:
        metadata: key → number, string or list. Arrays are kept only if the key begins with ``general.``.
        tensors: name → file and bytes of the tensor.
    """

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @property
    def architecture(self) -> str:
        """The architecture, as the format names it; empty if the file does not state it."""
        return str(self.metadata.get("general.architecture", ""))


def read_headers(paths: Iterable[Path]) -> GGUFHeader:
    """Read the headers of all parts of a GGUF file.

    Args:
        paths: the parts in order. The first one holds the metadata.

    Raises:
        ModelError: a file is truncated or corrupt, or two parts hold the same tensor.
    """
    metadata: dict[str, Any] = {}
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        try:
            one = _read_header(path)
        except (ValueError, struct.error, KeyError, OverflowError, IndexError) as error:
            raise ModelError(_say_damaged(path)) from error
        if double := tensors.keys() & one.tensors.keys():
            raise ModelError(f"{path} holds {min(double)}, which another part holds too; download the parts again")
        metadata = {**one.metadata, **metadata}
        tensors |= one.tensors
    return GGUFHeader(metadata, tensors)


def _say_damaged(path: Path) -> str:
    return f"the GGUF file {path} is truncated or corrupt: download it again"


def _read_header(path: Path) -> GGUFHeader:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        cursor = _Cursor(pages, 4)
        version, tensor_count, value_count = cursor.take("<I"), cursor.take("<Q"), cursor.take("<Q")
        if pages[:4] != b"GGUF" or version not in _VERSIONS:
            raise ValueError("another format or version")
        metadata = {}
        for _ in range(value_count):
            key = cursor.string()
            value = cursor.value(cursor.take("<I"), keep=key.startswith(_KEPT))
            if value is not None:
                metadata[key] = value
        entries = [cursor.tensor() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise ValueError("the alignment is not a positive number")
        start = -(-cursor.position // alignment) * alignment
        tensors = {name: StoredTensor(path, start + at, kind, shape) for name, shape, kind, at in entries}
        if len(tensors) < len(entries):
            raise ValueError("two tensors have one name")
        for tensor in tensors.values():
            entries_of_block, bytes_of_block = tensor.block
            if tensor.numel == 0 or not tensor.shape or tensor.shape[-1] % entries_of_block:
                raise ValueError("a tensor has no entries, or rows that are not whole blocks")
            if tensor.offset + tensor.numel // entries_of_block * bytes_of_block > len(pages):
                raise ValueError("a tensor ends beyond the file")
        return GGUFHeader(metadata, tensors)


class _Cursor:
    """Reads values one after another from the start of a file."""

    def __init__(self, pages: mmap.mmap, position: int) -> None:
        self._pages, self.position = pages, position

    def take(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._pages, self.position)
        self.position += struct.calcsize(form)
        return value

    def string(self) -> str:
        length = self.take("<Q")
        if length > len(self._pages) - self.position:
            raise ValueError("a string ends beyond the file")
        self.position += length
        return self._pages[self.position - length : self.position].decode("utf-8", errors="replace")

    def value(self, kind: int, *, keep: bool, level: int = 0) -> Any:
        """Return a value of metadata; None for an array that is not kept. ``level``: number of arrays around it."""
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.take(_SCALARS[kind])
        inner, count = self.take("<I"), self.take("<Q")
        if count > len(self._pages) or level == _MOST_LEVELS:
            raise ValueError("an array ends beyond the file, or holds too many levels of arrays")
        if keep:
            return [self.value(inner, keep=True, level=level + 1) for _ in range(count)]
        if inner in _SCALARS:
            self.position += count * struct.calcsize(_SCALARS[inner])
            return None
        for _ in range(count):
            if inner == _STRING:
                self.position += 8 + struct.unpack_from("<Q", self._pages, self.position)[0]
            else:
                self.value(inner, keep=False, level=level + 1)
        return None

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Return name, shape (outermost size first), kind and offset of a tensor."""
        name = self.string()
        count = self.take("<I")
        if count > _MOST_SIZES:
            raise ValueError("a tensor has more sizes than the format allows")
        sizes = [self.take("<Q") for _ in range(count)]
        return name, tuple(reversed(sizes)), self.take("<I"), self.take("<Q")
