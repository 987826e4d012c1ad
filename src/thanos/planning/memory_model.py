"""Memory model: peak bytes of Hessians, solves and weights, from shapes, dtypes and the recipe."""

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
        rows: number of outputs.
        columns: number of inputs.
        itemsize: bytes of one stored entry.
        settings: the layer's settings.
        group: number of the input group; layers with the same number share their input, and so the Hessian.
    """

    name: str
    rows: int
    columns: int
    itemsize: int
    settings: LayerRecipe
    group: int

    @property
    def kind(self) -> tuple[int, int, LayerRecipe]:
        """Rows, columns and settings, which determine the cost of the solve."""
        return self.rows, self.columns, self.settings

    @property
    def has_factor(self) -> bool:
        """Whether its method factorises the Hessian."""
        return registry.method(self.settings.method).needs_factor


def hessian_bytes(columns: int) -> int:
    """Return the bytes of one Hessian, (columns, columns) float32."""
    return 4 * columns**2


def groups(layers: Sequence[LayerWork]) -> dict[int, list[LayerWork]]:
    """Return group number → the layers that share this input, in order."""
    groups: dict[int, list[LayerWork]] = {}
    for layer in layers:
        groups.setdefault(layer.group, []).append(layer)
    return groups


def solve_bytes(layer: LayerWork) -> int:
    """Return the peak bytes of a layer's solve, in addition to its stored weight and its Hessian.

    During the whole solve: the weight in float32, a copy in its stored dtype, and two masks, of the kept weights and of the
    weights that were zero before. The method's file states the rest; methods with a factor add one matrix like the Hessian.
    """
    size = Size(layer.rows, layer.columns, min(layer.settings.resolved_block_size, layer.columns))
    throughout = (4 + layer.itemsize + 1 + 1) * size.entries
    row = registry.method(layer.settings.method)
    inside = registry.imported(row.memory)(layer.settings.parsed_pattern, size)
    return throughout + inside + (hessian_bytes(layer.columns) if row.needs_factor else 0)


def solving_bytes(layers: Sequence[LayerWork]) -> int:
    """Return the peak bytes of Hessians and solves, for layers whose statistics were gathered together.

    Groups are solved in order, and each Hessian is freed after its layers.
    """
    together = list(groups(layers).values())
    waiting = [hessian_bytes(group[0].columns) for group in together]
    return max((sum(waiting[i:]) + max(map(solve_bytes, group)) for i, group in enumerate(together)), default=0)


def largest_sum(counts: Iterable[int]) -> int:
    """Return the largest sum of two neighbouring counts: the weights of a block and of the next one, which is read ahead."""
    values = list(counts)
    return max((sum(values[i : i + 2]) for i in range(len(values))), default=0)
