"""The split of the removed parameters between neurons and heads, for all blocks: the one with the least predicted error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from thanos.errors import ModelError, RecipeError
from thanos.model.layers import LinearLayer
from thanos.patterns.rounding import floor_count
from thanos.patterns.units import HEADS, NEURONS
from thanos.solvers.allocation import Curve


def splits(
    counts: Mapping[str, int],
    sizes: Mapping[str, int],
    target: float,
    multiple: int,
    check: Callable[[Mapping[str, int]], None],
) -> list[dict[str, int]]:
    """Return the splits that are as near to the target as the neurons' multiple allows: at most one for each number of heads.

    A split must be nearer to the target than removing nothing. So no split removes twice the target or more.

    Args:
        counts: kind → number of units of a block.
        sizes: kind → parameters that are removed with one unit of every block.
        target: number of parameters to remove.
        multiple: the number of remaining neurons is a multiple of it.
        check: raises ModelError if the model's config cannot state a split.

    Raises:
        ModelError: the config can state none of them; the first reason.
        RecipeError: there is none.
    """
    found, reason = list[dict[str, int]](), None
    for heads in range(counts[HEADS]):
        wanted = (target - heads * sizes[HEADS]) / sizes[NEURONS]
        stays = min(counts[NEURONS], multiple * floor_count((counts[NEURONS] - wanted) / multiple + 0.5))
        removed = {NEURONS: counts[NEURONS] - stays, HEADS: heads}
        if stays <= 0 or abs(removed[NEURONS] - wanted) > multiple / 2 + 1e-9 or not any(removed.values()):
            continue
        if sum(number * sizes[kind] for kind, number in removed.items()) >= 2 * target:
            continue
        try:
            check(removed)
        except ModelError as error:
            reason = reason or error
        else:
            found.append(removed)
    if found:
        return found
    if reason is not None:
        raise reason
    raise RecipeError(
        f"no split of whole heads and a multiple of {multiple} neurons removes {target:,.0f} parameters of the blocks: one "
        f"neuron of every block has {sizes[NEURONS]:,}, a head {sizes[HEADS]:,}; change sparsity or multiple_of"
    )


def predicted_error(
    removed: Mapping[str, float], kinds: Mapping[LinearLayer, str], curves: Mapping[str, Curve]
) -> float:
    """Return the sum of gain · error over the layers whose curve is known.

    Args:
        removed: kind → number of units to remove, which need not be whole.
        kinds: layer → kind of its units.
        curves: layer name → error by fraction of removed units; ``size`` is the number of units.
    """
    return sum(
        curve.gain * error_at(curve, removed[kind] / curve.size)
        for layer, kind in kinds.items()
        if (curve := curves.get(layer.name)) is not None
    )


def error_at(curve: Curve, share: float) -> float:
    """Return a curve's error at a fraction: 0 at 0, linear up to the first measured fraction, geometric above it."""
    points = [(0.0, 0.0), *zip(curve.sparsities, curve.errors, strict=True)]
    pieces = list(pairwise(points))
    (x0, y0), (x1, y1) = next((piece for piece in pieces if share <= piece[1][0]), pieces[-1])
    part = (share - x0) / (x1 - x0)
    return y0 ** (1 - part) * y1**part if y0 > 0 and y1 > 0 else y0 + (y1 - y0) * part


def chosen_split(
    candidates: Sequence[Mapping[str, int]],
    sizes: Mapping[str, int],
    target: float,
    kinds: Mapping[LinearLayer, str],
    curves: Mapping[str, Curve],
) -> dict[str, Any]:
    """Return the record of the choice: the predicted error of each split, the best first.

    Splits of whole units differ by some parameters. So they are compared with the number of neurons that meets the target.
    ``candidates`` is the result of :func:`splits`; the other arguments are those of :func:`splits` and
    :func:`predicted_error`.
    """

    def exact(removed: Mapping[str, int]) -> dict[str, float]:
        return {**removed, NEURONS: max(0.0, (target - removed[HEADS] * sizes[HEADS]) / sizes[NEURONS])}

    errors = [(predicted_error(exact(removed), kinds, curves), dict(removed)) for removed in candidates]
    ranked = sorted(errors, key=lambda pair: pair[0])
    return {"splits": [{"removed": removed, "predicted_error": error} for error, removed in ranked]}
