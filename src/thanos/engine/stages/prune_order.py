"""The order in which a block's layers are pruned: steps in the order of the forward pass, in parts that fit in memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from thanos.calibration.statistics import plan_passes, statistics_budget
from thanos.engine.block_flow import Stream, residual_streams
from thanos.engine.routing import Routing
from thanos.engine.stages.base import BlockContext
from thanos.model.layers import LinearLayer
from thanos.recipe.repair import AUTO

Step = list[list[LinearLayer]]
"""Parts of layers. One pass over the sequences gathers the statistics of a part, with the weights before the step."""

_PAIRED_MATRICES = 3
"""Matrices (b, b) for each input of a layer with a dense target: XᵀX, X*ᵀX̂, and about one for (r* − r̂)ᵀX̂."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps of a block.

    Attributes:
        steps: the steps, in order.
        streams: layer that writes into the residual stream → the stream to which its output is added.
        pairable: names of the layers that have a dense target, for which products with the dense model's inputs exist.
        chosen: names of those whose target is chosen on held-out sequences.
        samples: number of this process's sequences.
        rest: number of them that are not held out.
        calls: names of the layers in the order of their calls; see :func:`~thanos.engine.early_end.stopping_after`.
    """

    steps: list[Step]
    streams: Mapping[str, Stream] = field(default_factory=dict)
    pairable: Collection[str] = frozenset()
    chosen: Collection[str] = frozenset()
    samples: int = 0
    rest: int = 0
    calls: list[str] = field(default_factory=list)

    def pairs(self, layers: Sequence[LinearLayer]) -> bool:
        """Return whether a layer of a part needs products with the dense model's inputs."""
        return any(layer.name in self.pairable for layer in layers)

    def fitted(self, layers: Sequence[LinearLayer]) -> int:
        """Return the number of this process's sequences, from the first, to which the layers of a part are fitted."""
        return self.rest if any(layer.name in self.chosen for layer in layers) else self.samples


def plan_of(context: BlockContext) -> Plan:
    """Return the steps of a block, or of the layers after the blocks.

    Layers that are not ``sequential`` belong to the first step: their statistics are gathered with the whole block unpruned.
    A layer in a list of experts that the model's own code calls has no matching tokens in the dense stream. It is pruned
    without its dense target.
    """
    layers = list(context.layers)
    samples, _ = context.runner.shape
    if context.index is None:
        targeted = [layer for layer in layers if context.layers[layer].repair.retargets]
        return Plan(
            [[[layer]] for layer in layers],
            pairable={layer.name for layer in targeted},
            chosen=_chosen(context, targeted),
            samples=samples,
            rest=samples - len(context.held_out),
        )
    targeted = [layer for layer in layers if context.layers[layer].repair.retargets]
    routing = Routing(context.module)
    pairable = {layer.name for layer in targeted if routing.covers(layer)}
    chosen = _chosen(context, targeted) & pairable
    streams = _streams(context, layers, {layer.name for layer in targeted})
    steps = [
        plan_passes(step, statistics_budget(context.device), matrices=_PAIRED_MATRICES if pairable else 1)
        for step in _steps(context, layers, streams)
    ]
    calls = [] if context.order is None else list(context.order.calls)
    return Plan(steps, streams, pairable, chosen, samples, samples - len(context.held_out), calls)


def _chosen(context: BlockContext, targeted: Sequence[LinearLayer]) -> set[str]:
    return {layer.name for layer in targeted if context.layers[layer].repair.dense_target == AUTO}


def _steps(context: BlockContext, layers: list[LinearLayer], streams: Mapping[str, Stream]) -> list[list[LinearLayer]]:
    waiting = {layer.name for layer in layers if context.layers[layer].repair.sequential}
    if not layers or not waiting:
        return [layers] if layers else []
    assert context.order is not None
    level = context.order.levels
    first = min(level[name] for name in waiting), False
    # Two layers that are added in the same sum would both correct the same error of the residual stream. So the second of them
    # is pruned in a later step, after the correction by the first.
    names = [layer.name for layer in layers]
    second = {name for name in names if name in streams and streams[name].parallel in names[: names.index(name)]}
    step = {name: (level[name], name in second) if name in waiting else first for name in names}
    return [[layer for layer in layers if step[layer.name] == number] for number in sorted(set(step.values()))]


def _streams(context: BlockContext, layers: Sequence[LinearLayer], targeted: Collection[str]) -> dict[str, Stream]:
    """Return the streams of the layers with a dense target."""
    if not targeted:
        return {}
    hidden = context.first_sequence()

    def find() -> dict[str, Stream]:
        return residual_streams(lambda: context.forward(hidden, 0), hidden, context.module, layers)

    return {name: stream for name, stream in context.world.from_first(find).items() if name in targeted}
