"""How many units of a layer stay, and how its columns are ordered by units."""

from __future__ import annotations

import torch
from torch import Tensor

from thanos.errors import ModelError, RecipeError
from thanos.patterns.rounding import floor_count
from thanos.patterns.units import BLOCKS


def units_that_stay(count: int, share: float, multiple: int, kind: str) -> int:
    """Return how many of ``count`` units stay: the multiple nearest to the share that stays.

    Raises:
        RecipeError: none or all of them would stay.
    """
    wanted = count * (1 - share)
    stays = multiple * floor_count(wanted / multiple + 0.5)
    if 0 < stays < count:
        return stays
    what = f"of {count} {kind}{'' if kind == BLOCKS else ' in each block'}, sparsity {share:g} leaves {wanted:g}"
    if multiple > 1:
        most = (count - 1) // multiple * multiple
        possible = f"from {multiple} to {most} of them may stay" if most else f"lower it, since there are only {count}"
        raise RecipeError(f"{what}, and the nearest multiple of {multiple} is {stays}; {possible} (multiple_of)")
    possible = f"from 1 to {count - 1} may go" if count > 1 else "there is only one, which has to stay"
    raise RecipeError(f"{what}, which is {'none' if stays <= 0 else 'all of them'} in whole {kind}; {possible}")


def runs_of(columns: Tensor) -> int:
    """Return the number of runs of consecutive columns of each unit, from the units' columns (units, columns of a unit).

    Raises:
        ModelError: the columns are not ordered by run, unit and place in the run.
    """
    runs = 1 + int((columns[0].diff() != 1).sum())
    count, width = columns.shape
    ordered = torch.arange(columns.numel()).view(runs, count, width // runs).transpose(0, 1).reshape(count, width)
    if not torch.equal(ordered, columns):
        raise ModelError("the columns of the units are in an unknown order")
    return runs
