"""Bytes that a run holds at its fullest, from shapes, dtypes and the recipe: the books of the engine and the solvers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from thanos import registry
from thanos.recipe.layer import LayerRecipe
from thanos.solvers.cost import Size


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
        return registry.method(self.settings.method).needs_factor


def hessian_bytes(columns: int) -> int:
    """Return the bytes of one Hessian, float32."""
    return 4 * columns**2


def groups(layers: Sequence[LayerWork]) -> dict[int, list[LayerWork]]:
    """Return the layers by the input that they share, in order."""
    groups: dict[int, list[LayerWork]] = {}
    for layer in layers:
        groups.setdefault(layer.group, []).append(layer)
    return groups


def solve_bytes(layer: LayerWork) -> int:
    """Return what solving a layer holds beside its stored weight and its Hessian, factor included.

    The weight in float32 and its stored copy, the mask of what stays and of what was zero throughout; then what the method's
    file states.
    """
    size = Size(layer.rows, layer.columns, min(layer.settings.resolved_block_size, layer.columns))
    throughout = (4 + layer.itemsize + 1 + 1) * size.entries
    row = registry.method(layer.settings.method)
    inside = registry.imported(row.memory)(layer.settings.parsed_pattern, size)
    return throughout + inside + (hessian_bytes(layer.columns) if row.needs_factor else 0)


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
