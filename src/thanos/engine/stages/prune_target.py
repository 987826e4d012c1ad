"""The dense targets of a block's layers: which have one, the choice of α, and the shifted problem for the solvers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from thanos.calibration.statistics import InputGroup
from thanos.engine.dense_choice import Choice, choose
from thanos.engine.output_error import output_errors
from thanos.engine.stages.base import BlockContext
from thanos.model.layers import LinearLayer
from thanos.recipe.repair import AUTO, DENSE_TARGETS
from thanos.solvers.hessian import InputStatistics
from thanos.solvers.retarget import DenseTarget
from thanos.solvers.stand_in import StandIn, stand_in


def is_open(context: BlockContext, layer: LinearLayer, group: InputGroup) -> bool:
    """Return whether a layer's dense target is to be chosen, and there are products with the dense inputs for it."""
    return group.pairs is not None and context.layers[layer].repair.dense_target == AUTO


def choose_target(
    context: BlockContext, groups: Sequence[InputGroup], known: Mapping[int, InputStatistics | None]
) -> Choice:
    """Choose one dense target for all layers of the groups whose target is to be chosen."""
    found: dict[LinearLayer, StandIn] = {}
    for group in groups:
        inputs = known[id(group)]
        for layer in group.layers:
            target = target_of(layer, group, 1.0)
            if is_open(context, layer, group) and target is not None and inputs is not None:
                stored = layer.oriented(context.weights.stored(layer.weight_name))
                found[layer] = stand_in(
                    stored, inputs, context.layers[layer], target, name=layer.name, row_shards=context.world
                )
    if context.index is None:
        ((layer, one),) = found.items()  # after the blocks each layer is a step of its own
        return Choice(output_errors(context, layer, one, DENSE_TARGETS))
    meter = context.block_meter
    assert meter is not None

    def stand_ins(alpha: float) -> dict[str, Tensor]:
        current = {layer: context.weights.parameter(layer.weight_name) for layer in found}
        return {
            layer.weight_name: layer.oriented(one.at(alpha)).contiguous().to(current[layer].dtype)
            for layer, one in found.items()
        }

    return choose(stand_ins, lambda values: meter.error(values, by_token=True))


def target_of(layer: LinearLayer, group: InputGroup, alpha: float) -> DenseTarget | None:
    """Return the retarget for α; None if it would change nothing."""
    if group.pairs is None or alpha == 0:
        return None
    residual = group.pairs.residuals.get(layer.name)
    return DenseTarget(alpha, group.pairs.cross.sums, None if residual is None else residual.sums)


def alpha_of(context: BlockContext, layer: LinearLayer, group: InputGroup, choice: Choice | None) -> float | None:
    """Return the dense target of a layer; None without products with the dense inputs, or if it is off."""
    wanted = context.layers[layer].repair.dense_target
    if group.pairs is None or wanted == 0:
        return None
    if wanted != AUTO:
        return float(wanted)
    return None if choice is None else choice.alpha
