"""Bytes that a run holds at its fullest, from shapes, dtypes and the recipe: the books of the engine and the solvers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from thanos.patterns.unstructured import Unstructured
from thanos.recipe import LayerRecipe

_SLAB = 1024
"""Columns of a product that an energy holds at once (solvers)."""

_ROW_VECTORS = 10
"""Matrices of rows by block size that the rows' iteration holds at once (solvers/rows.py)."""


@dataclass(frozen=True, slots=True)
class LayerWork:
    """One layer to solve.

    Attributes:
        name: full module name.
        rows: outputs.
        columns: inputs.
        itemsize: bytes of an entry as it is stored.
        settings: what is done to it.
        group: layers with the same number share their input, and so the Hessian.
    """

    name: str
    rows: int
    columns: int
    itemsize: int
    settings: LayerRecipe
    group: int

    @property
    def kind(self) -> tuple[int, int, LayerRecipe]:
        """What its solve depends on."""
        return self.rows, self.columns, self.settings

    @property
    def has_factor(self) -> bool:
        """Whether its method factorises the Hessian."""
        return self.settings.method in ("thanos", "sparsegpt")


def hessian_bytes(columns: int) -> int:
    """Return the bytes of one Hessian, float32."""
    return 4 * columns**2


def groups(layers: Sequence[LayerWork]) -> dict[int, list[LayerWork]]:
    """Return the layers by the input that they share, in order."""
    found: dict[int, list[LayerWork]] = {}
    for layer in layers:
        found.setdefault(layer.group, []).append(layer)
    return found


def solve_bytes(layer: LayerWork) -> int:
    """Return what solving a layer holds beside its stored weight and its Hessian, factor included.

    The weight in float32 and its stored copy, the mask of what stays and of what was zero throughout; then either the
    method's own matrices, or its result, the result as written and the change whose energy is measured.
    """
    entries, stored = layer.rows * layer.columns, layer.itemsize
    throughout = (4 + stored + 1 + 1) * entries
    image = 4 * layer.rows * min(_SLAB, layer.columns)
    if layer.settings.method == "magnitude":
        return throughout + (4 + 1 + 4) * entries + image
    if not layer.has_factor:  # scores are sorted by rows: values and 64-bit positions
        return throughout + (4 + 4 + 8) * entries
    unstructured = layer.settings.method == "thanos" and isinstance(layer.settings.parsed_pattern, Unstructured)
    scores = 4 * entries if unstructured else 0
    block = min(layer.settings.resolved_block_size, layer.columns)
    inside = (4 + 1) * entries + scores + max(3 * entries if scores else 0, 4 * _ROW_VECTORS * layer.rows * block)
    after = (4 + 1 + 4 + 4) * entries + image
    return hessian_bytes(layer.columns) + throughout + max(inside, after)


def solving_bytes(layers: Sequence[LayerWork]) -> int:
    """Return the peak of Hessians and solves of layers whose statistics were gathered together.

    Groups are solved in order, and each Hessian goes when its layers are done.
    """
    together = list(groups(layers).values())
    waiting = [hessian_bytes(group[0].columns) for group in together]
    return max((sum(waiting[i:]) + max(map(solve_bytes, group)) for i, group in enumerate(together)), default=0)


def largest_sum(counts: Iterable[int]) -> int:
    """Return the largest sum of two neighbours: a block's weights and those that are read ahead."""
    values = list(counts)
    return max((sum(values[i : i + 2]) for i in range(len(values))), default=0)
