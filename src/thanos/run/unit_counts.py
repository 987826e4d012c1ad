"""The number of units that remain in a layer, and the order of its columns by units."""

from __future__ import annotations

import torch
from torch import Tensor

from thanos.errors import ModelError, RecipeError
from thanos.patterns.rounding import floor_count
from thanos.patterns.units import BLOCKS


def remaining_units(count: int, share: float, multiple: int, kind: str) -> int:
    """Return how many of ``count`` units remain: the multiple of ``multiple`` nearest to ``count`` · (1 − ``share``).

    ``kind`` is the plural of the units, for messages. Raises RecipeError if none or all of them would remain.
    """
    wanted = count * (1 - share)
    stays = multiple * floor_count(wanted / multiple + 0.5)
    if 0 < stays < count:
        return stays
    what = f"of {count} {kind}{'' if kind == BLOCKS else ' in each block'}, sparsity {share:g} leaves {wanted:g}"
    if multiple > 1:
        most = (count - 1) // multiple * multiple
        possible = f"{_range(multiple, most)} of them may remain; change sparsity or multiple_of"
        if not most:
            possible = f"no multiple of it is between 0 and {count}; lower multiple_of"
        raise RecipeError(f"{what}, and the nearest multiple of {multiple} is {stays}; {possible}")
    if count == 1:
        raise RecipeError(f"{what}; there is only one, which must remain")
    raise RecipeError(
        f"{what}, which rounds to {'none' if stays <= 0 else 'all of them'}; {_range(1, count - 1)} of them may be removed; "
        "change sparsity"
    )


def _range(first: int, last: int) -> str:
    return f"from {first} to {last}" if first < last else str(first)


def runs_of(columns: Tensor) -> int:
    """Return the number of runs of consecutive columns of each unit, from the units' columns (units, columns of a unit).

    Raises ModelError if the columns are not ordered by run, unit and position in the run.
    """
    runs = 1 + int((columns[0].diff() != 1).sum())
    count, width = columns.shape
    ordered = torch.arange(columns.numel()).view(runs, count, width // runs).transpose(0, 1).reshape(count, width)
    if not torch.equal(ordered, columns):
        raise ModelError("the columns of the units are in an unknown order")
    return runs
