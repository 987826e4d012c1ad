"""Accumulators: sums over tokens of the statistics of a layer's inputs X, (a, b).

Sums over batches, or over processes, can be added. :class:`CrossGram` is a sum over two streams: the inputs of the dense model,
X*, and those of the model pruned so far, X̂.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from thanos.solvers.precision import full_float32

_GRAM_ROWS = {"cpu": 256, "cuda": 2048}
"""Rows of XᵀX multiplied at once, by device type. The part below the diagonal follows from symmetry, so only about half of a
wide matrix is multiplied. Narrower panels would make the products slow."""


@dataclass(slots=True)
class Sum:
    """A sum over tokens.

    Attributes:
        sums: the sums over tokens, on the device of the inputs; those of several processes may be added.
        tokens: number of rows of X so far.
    """

    sums: Tensor
    tokens: int = 0

    def finite(self) -> Tensor:
        """Return whether the sums hold no NaN and no infinity, a 0-d bool tensor."""
        return torch.isfinite(self.sums).all()


class Accumulator(Sum, ABC):
    """A sum over the tokens of one input."""

    __slots__ = ()

    def finite(self) -> Tensor:
        """See :class:`Sum`; a column of NaN or infinity shows in its diagonal entry."""
        return torch.isfinite(self.squared_norms()).all()

    @abstractmethod
    def add(self, rows: Tensor) -> None:
        """Add the rows of X (T, b)."""

    @abstractmethod
    def squared_norms(self) -> Tensor:
        """Return the squared norms of the columns, (b,) float32."""


@dataclass(slots=True)
class Gram(Accumulator):
    """XᵀX; ``sums`` is (b, b) float32."""

    @classmethod
    def empty(cls, columns: int, device: torch.device) -> Gram:
        """Return the sum over no tokens."""
        return cls(torch.zeros(columns, columns, dtype=torch.float32, device=device))

    def add(self, rows: Tensor) -> None:
        """See :class:`Accumulator`."""
        add_gram(self.sums, rows)
        self.tokens += rows.shape[0]

    def squared_norms(self) -> Tensor:
        """See :class:`Accumulator`."""
        return self.sums.diagonal()


@dataclass(slots=True)
class SquaredNorms(Accumulator):
    """The diagonal of XᵀX, with the same bits as in :class:`Gram`.

    A sum of squares would be cheaper but rounds differently: a score at the threshold would move to the other side of it.
    So the diagonal blocks of XᵀX are multiplied, as wide as the panels of :func:`add_gram`. On the CPU an entry was measured
    to have the same bits however many columns are multiplied with it; with 16-bit inputs also on an H100. See :meth:`suits`.

    ``sums`` is (blocks, width, width) float32.
    """

    columns: int = 0

    @classmethod
    def empty(cls, columns: int, device: torch.device) -> SquaredNorms:
        """Return the sums over no tokens."""
        width = min(columns, _GRAM_ROWS.get(device.type, _GRAM_ROWS["cpu"]))
        blocks = -(-columns // max(1, width))
        return cls(torch.zeros(blocks, width, width, dtype=torch.float32, device=device), columns=columns)

    @staticmethod
    def suits(columns: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Return whether this accumulator costs less than XᵀX and has the bits of its diagonal.

        It does not for float32 on CUDA: another width may select another kernel, with another summation order.
        """
        width = _GRAM_ROWS.get(device.type, _GRAM_ROWS["cpu"])
        return columns >= 2 * width and (device.type != "cuda" or dtype.itemsize < 4)

    def add(self, rows: Tensor) -> None:
        """See :class:`Accumulator`."""
        rows = _multiplicable(rows)
        for block, part in zip(self.sums, rows.split(self.sums.shape[-1], dim=1), strict=True):
            size = part.shape[1]
            _add_product(block[:size, :size], part.T, part)
        self.tokens += rows.shape[0]

    def squared_norms(self) -> Tensor:
        """See :class:`Accumulator`."""
        return self.sums.diagonal(dim1=1, dim2=2).reshape(-1)[: self.columns]


@dataclass(slots=True)
class CrossGram(Sum):
    """AᵀB of two tensors with the same tokens, (a, b) float32: of the dense inputs X* and the pruned inputs X̂, for example.

    Products are exact in float32, as those of :class:`Gram`.
    """

    @classmethod
    def empty(cls, rows: int, columns: int, device: torch.device) -> CrossGram:
        """Return the sum over no tokens."""
        return cls(torch.zeros(rows, columns, dtype=torch.float32, device=device))

    def add(self, left: Tensor, right: Tensor) -> None:
        """Add AᵀB of A, ``left`` (T, a), and B, ``right`` (T, b)."""
        left, right = _multiplicable(left), _multiplicable(right)
        _add_product(self.sums, left.T, right)
        self.tokens += right.shape[0]

    def add_difference(self, left: Tensor, other: Tensor, right: Tensor) -> None:
        """Add (A − C)ᵀB of A, ``left`` (T, a), C, ``other`` (T, a), and B, ``right`` (T, b)."""
        if _is_sixteen_bit(right) and left.dtype == other.dtype == right.dtype:
            # The difference would be rounded to 16 bits. Two products are not.
            _add_product(self.sums, left.T, right)
            torch.addmm(self.sums, other.T, right, alpha=-1, out_dtype=torch.float32, out=self.sums)
        else:
            _add_product(self.sums, (left.to(torch.float32) - other.to(torch.float32)).T, right.to(torch.float32))
        self.tokens += right.shape[0]


def add_gram(hessian: Tensor, rows: Tensor) -> None:
    """Add XᵀX to ``hessian`` (b, b) float32, symmetric; X is ``rows`` (T, b) of any dtype. Products are exact in float32."""
    rows = _multiplicable(rows)
    panel = _GRAM_ROWS.get(rows.device.type, _GRAM_ROWS["cpu"])
    # Multiply each panel from its diagonal block to the right; mirror the rest below.
    for start in range(0, hessian.shape[0], panel):
        stop = start + panel
        _add_product(hessian[start:stop, start:], rows[:, start:stop].T, rows[:, start:])
        hessian[stop:, start:stop].copy_(hessian[start:stop, stop:].T)


def _multiplicable(rows: Tensor) -> Tensor:
    """Return rows in a dtype whose products are exact in float32: unchanged if 16 bits wide on CUDA, else float32."""
    return rows if _is_sixteen_bit(rows) else rows.to(torch.float32)


def _is_sixteen_bit(rows: Tensor) -> bool:
    return rows.dtype in (torch.bfloat16, torch.float16) and rows.is_cuda


def _add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to ``sums``, float32, in place."""
    if _is_sixteen_bit(right):
        # 16-bit products are exact in float32. The tensor cores sum them in float32, into ``sums``, without a copy of X.
        torch.addmm(sums, left, right, out_dtype=torch.float32, out=sums)
    else:
        with full_float32():
            sums.addmm_(left, right)
