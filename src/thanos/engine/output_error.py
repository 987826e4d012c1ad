"""The error of a layer after the blocks, such as lm_head, on held-out sequences: its outputs against those of the dense model.

It chooses the dense target of such a layer, which belongs to no block. Its outputs are the model's outputs, or nearly so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from thanos.engine.block_error import token_errors
from thanos.engine.early_end import stopping_at
from thanos.model.layers import LinearLayer
from thanos.solvers.precision import full_float32
from thanos.solvers.stand_in import StandIn

if TYPE_CHECKING:
    from thanos.engine.stages.base import BlockContext

_ROWS = 256
"""Number of tokens whose outputs are in memory at once, since a vocabulary has up to 256,000 entries."""


def output_errors(
    context: BlockContext, layer: LinearLayer, stand_in: StandIn, alphas: Iterable[float]
) -> dict[float, float]:
    """Return α → mean of the tokens' relative squared errors ‖x̂ V(α)ᵀ − x* Wᵀ‖² / ‖x* Wᵀ‖² over the held-out sequences.

    W is the weight in the checkpoint of ``layer``, which follows the blocks; V(α) are its stand-ins. A bias is the same in
    both models and is left out. ``context`` has a dense stream.
    """
    alphas = list(alphas)
    dtype = stand_in.slope.dtype
    dense = layer.oriented(context.dense(layer.weight_name)).to(dtype)
    weight = stand_in.weight.to(dtype)
    sums = torch.zeros(len(alphas) + 1, dtype=torch.float64, device=context.device)
    for now, wanted in _held_out_inputs(context, layer):
        for x, y in zip(now.to(dtype).split(_ROWS), wanted.to(dtype).split(_ROWS), strict=True):
            with full_float32():
                outputs, change, slope = y @ dense.T, x @ weight.T, x @ stand_in.slope.T
            whole = outputs.square().sum(-1, dtype=torch.float64)
            change -= outputs
            for number, alpha in enumerate(alphas):
                lost = (change + alpha * slope).square().sum(-1, dtype=torch.float64)
                sums[number] += token_errors(lost, whole).sum()
            sums[-1] += len(x)
    *errors, tokens = context.world.sum_(sums).tolist()
    return {alpha: error / tokens for alpha, error in zip(alphas, errors, strict=True)}


def _held_out_inputs(context: BlockContext, layer: LinearLayer) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the layer's inputs in the model pruned so far and in the dense model, both (T, b), for each held-out sequence."""
    runner, stream, held_out = context.runner, context.dense_stream, context.held_out
    assert stream is not None
    seen: list[Tensor] = []

    def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].reshape(-1, args[0].shape[-1]))

    begin, end = held_out.start, held_out.stop
    with layer.module.register_forward_pre_hook(see), stopping_at(layer):
        both = zip(runner.batches(1, begin, end), stream.inputs(1, begin, end), strict=True)
        for (index, hidden), (_, wanted) in both:
            runner.observe_tail_of(index, hidden)
            with stream.weights():
                runner.observe_tail_of(index, wanted)
            now, dense = seen
            seen.clear()
            yield now, dense
