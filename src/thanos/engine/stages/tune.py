"""Tuning of a pruned block with its zeros fixed; see :mod:`thanos.engine.tuning`.

The stage tunes the kept weights, the biases of the pruned layers, and other parameters of the block, such as gains. It does not
change zeros of matrices, linear layers that the recipe leaves dense (``skip``, ``targets``) or whose own ``tune`` is 0, routers
of a mixture of experts, parameters that another module shares, and buffers.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from thanos.calibration.generation import SEEDS
from thanos.engine.block_arguments import mapped
from thanos.engine.stages.base import BlockContext
from thanos.engine.tuned_parameters import Tunable
from thanos.engine.tuning import Tuned, TuningProgress, tune
from thanos.engine.tuning_passes import Work
from thanos.events import Event
from thanos.model.experts import router_parameters
from thanos.model.layers import linear_names
from thanos.system.memory import release_free_heap

_SEEDS = 1_000_003
"""A prime larger than any number of blocks. So each pair of recipe seed and block has a seed of its own."""


@dataclass(frozen=True, slots=True)
class TuneStage:
    """Tunes a block towards the outputs of the dense block.

    The number of epochs is the largest ``tune`` of the block's layers; a block without any is left as it is.

    Args:
        rate: highest learning rate, as a fraction of the root mean square of the block's kept weights.
        seed: seed of the recipe.
        by_token: whether the error is the mean of the tokens' own relative errors.
        name: name of the stage in the records.
    """

    rate: float
    seed: int
    by_token: bool = False
    name: str = "tune"

    def __call__(self, context: BlockContext) -> Iterator[Event]:
        """See :class:`~thanos.engine.stages.base.BlockStage`."""
        epochs = epochs_of(context)
        if context.index is None or not epochs:
            return
        began = time.perf_counter()
        context.runner.close_branches()  # the weights before the branches' last layers change
        yield context.event("phase", "tune")
        with context.meter.phase("tune"):
            tuned = yield from self._tune_or_spill(context, epochs)
            change = sum(
                _zeros(value) - _zeros(context.weights.parameter(name))
                for name, value in tuned.values.items()
                if name.removesuffix(".weight") not in context.records
            )
            for name, value in tuned.values.items():
                context.put(name, value)
            release_free_heap()  # the memory of the backward passes
        seconds = time.perf_counter() - began
        context.tuning = replace(tuned.record, block=context.index, zeros_elsewhere=change, seconds=seconds)
        if tuned.record.reason:
            where = f"block {context.index + 1} is left as it was before tuning"
            yield context.note(f"{where}: {tuned.record.reason}", "tune")

    def _tune_or_spill(self, context: BlockContext, epochs: int) -> Generator[Event, None, Tuned]:
        """Tune the block. If one sequence does not fit, move the hidden states off the device and start once more."""
        assert context.index is not None, "the modules after the blocks are not a block"
        seed = (self.seed * _SEEDS + context.index) % SEEDS

        def steps() -> Generator[TuningProgress, None, Tuned]:
            return tune(_work(context, self.by_token), epochs=epochs, rate=self.rate, seed=seed, world=context.world)

        try:
            return (yield from _events(context, steps()))
        except torch.OutOfMemoryError:
            # With several ranks a local retry would desynchronise the collectives.
            if context.world.size > 1 or not context.on_device:
                raise
        # Outside the except block: inside it, the error's traceback still refers to the tensors of the failed pass.
        for line in context.spill():
            yield context.note(line, "tune")
        return (yield from _events(context, steps()))


def epochs_of(context: BlockContext) -> int:
    """Return the number of epochs of a block's tuning; 0 for none."""
    return max((settings.repair.tune for settings in context.layers.values()), default=0)


def tunables(context: BlockContext) -> list[Tunable]:
    """Return the parameters of a block that are tuned, in the order of the model.

    Usually a linear layer without settings is one that the recipe leaves dense. Nothing of it is tuned, not even its bias. If
    the patterns remove units, only the layers that write a unit's output have settings. The other layers are then tuned too;
    their entries that belong to removed units are cut out at the end of the run.
    """
    assert context.index is not None, "the modules after the blocks are not a block"
    tuned = {layer.name for layer, settings in context.layers.items() if settings.repair.tune}
    cuts = any(settings.parsed_pattern.unit_kinds for settings in context.layers.values())
    linear = {layer.name for layer in context.layers} if cuts else _linear(context)
    untuned = linear - tuned
    routers = {f"{context.prefix}{name}" for name in router_parameters(context.module)}
    weights, found = context.weights, []
    for name in context.parameter_names:
        value = weights.parameter(name)
        fixed = name in routers or name.rpartition(".")[0] in untuned
        if not fixed and weights.is_own(name) and value.is_floating_point():
            found.append(Tunable(name, value, weights.stored_dtype(name), sparse=value.dim() > 1))
    return found


def _linear(context: BlockContext) -> set[str]:
    return {f"{context.prefix}{name}" for name in linear_names(context.module)}


def _work(context: BlockContext, by_token: bool) -> Work:
    found = tunables(context)
    names = {tunable.name for tunable in found}
    # In training everything is float32. Parameters that are not tuned are converted once.
    others = {
        name: value.float()
        for name in context.parameter_names
        if name not in names and (value := context.weights.parameter(name)).is_floating_point()
    }
    held = context.runner.dtype

    def forward(parameters: Mapping[str, Tensor], hidden: Tensor, rows: Sequence[int]) -> Tensor:
        if hidden.dtype == held:
            with context.weights.replaced(parameters):
                return context.forward(hidden, rows)
        with context.weights.replaced({**others, **parameters}), _float32_arguments(context.module, context.device):
            return context.forward(hidden, rows)

    counts = torch.tensor([context.runner.shape[0], len(context.held_out)], device=context.device)
    samples, held_out = context.world.sum_(counts).tolist()
    return Work(
        forward=forward,
        tunables=found,
        read=context.targets_of,
        training=range(samples - held_out),
        held_out=range(samples - held_out, samples),
        mine=context.world.share(samples),
        device=context.device,
        by_token=by_token,
    )


def _events(context: BlockContext, steps: Generator[TuningProgress, None, Tuned]) -> Generator[Event, None, Tuned]:
    """Yield an event for each step; return the result."""
    before: float | None = None
    length = context.runner.shape[1]
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            return end.value
        before = step.held_out if before is None else before
        yield context.event(
            "progress",
            "tune",
            done=step.done,
            total=step.total,
            tokens=step.done * length,
            loss=step.loss,
            held_out=step.held_out,
            held_out_before=before,
        )


@contextmanager
def _float32_arguments(block: nn.Module, device: torch.device) -> Iterator[None]:
    """On the CPU, convert the block's other arguments, such as positions and masks, to float32 too.

    On CUDA, autocast converts the operands of an operation where they must have equal dtypes.
    """
    if device.type == "cuda":
        yield
        return
    handle = block.register_forward_pre_hook(
        lambda _, args, kwargs: (_float32(args), _float32(kwargs)), with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()


def _float32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, MutableMapping):
        return mapped(value, {name: _float32(item) for name, item in value.items()})
    return type(value)(map(_float32, value)) if type(value) in (tuple, list) else value


def _zeros(value: Tensor) -> int:
    return value.numel() - int(value.count_nonzero())
