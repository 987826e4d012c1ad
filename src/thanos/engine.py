"""The loop: block by block, gather statistics, solve, write, and feed the pruned block's outputs to the next.

The name of a method never occurs here; what is done to a layer is its :class:`~thanos.recipe.LayerRecipe`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from thanos.blocks import BlockCalls, stop
from thanos.errors import ModelError
from thanos.events import Event, Phase
from thanos.memory import PhaseMeter
from thanos.recipe import LayerRecipe, Recipe
from thanos.report import LayerRecord, expert_notes
from thanos.shards import CheckpointWriter
from thanos.solvers import PrunedWeight, prune_layer
from thanos.solvers.factor import InputStatistics
from thanos.statistics import InputGroup, check_finite, gather, plan_passes
from thanos.structure import LinearLayer
from thanos.weights import ModelWeights

_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
"""Tokens per forward pass: enough to keep the device busy, small against a block's weights."""

_STATISTICS_BYTES = {"cpu": 4 << 30, "cuda": 16 << 30}
"""Hessians held at once. A block of many experts needs more, and is run once for each part of them instead."""

_ACTIVATION_SHARE = 0.4
"""Share of the device's free memory that the activations between blocks may take; else they stay on the host."""

_BAD_CONDITION = 1e6
"""Above this, float32 solves keep fewer than one digit in ten of their precision."""


@dataclass(slots=True)
class Engine:
    """One pruning run over a model whose weights come in and go out block by block.

    Args:
        model: the skeleton.
        blocks_name: full name of the module list that holds the decoder blocks.
        blocks: those blocks.
        layers: the layers to prune.
        weights: the skeleton's parameters.
        writer: takes finished tensors.
        recipe: what to do.
        ids: calibration token ids, (samples, T) int64, on the CPU.
        device: where blocks run and layers are solved.
        meter: seconds and peak memory by phase.

    Attributes:
        records: one per pruned layer, in order.
        notes: warnings about the run as a whole.
    """

    model: nn.Module
    blocks_name: str
    blocks: list[nn.Module]
    layers: list[LinearLayer]
    weights: ModelWeights
    writer: CheckpointWriter
    recipe: Recipe
    ids: Tensor
    device: torch.device
    meter: PhaseMeter
    records: list[LayerRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _calls: BlockCalls = field(init=False)
    _hidden: Tensor = field(init=False)
    _held: dict[str, Tensor] | None = None  # pruned weights that the block must not have yet
    _began: float = field(default_factory=time.perf_counter)

    def run(self) -> Iterator[Event]:
        """Do the work; yields events as it goes. Afterwards ``records`` is complete and every tensor is written.

        Raises:
            NumericsError: weights or activations hold NaN or infinity.
            ResourceError: memory or disk is exhausted.
            ModelError: a targeted layer outside the blocks cannot be pruned.
        """
        with torch.inference_mode():
            yield from self._record_calls()
            for index in range(len(self.blocks)):
                yield from self._prune_block(index)
            yield from self._prune_tail()
        self.notes += expert_notes({layer.name: layer.expert for layer in self.layers if layer.expert}, self.records)

    # --- phases -----------------------------------------------------------------------------------------------------

    def _record_calls(self) -> Iterator[Event]:
        """Run what comes before the first block, for every sequence; keep that block's inputs and all arguments."""
        yield self._event("phase", "calibration")
        with self.meter.phase("calibration"):
            outer = self._outer_names()
            self.weights.load(outer)
            self._calls = BlockCalls(self.blocks)
            handles = [layer.module.register_forward_pre_hook(_refuse_early(layer)) for layer in self._tail_layers()]
            for index in range(len(self.ids)):
                hidden = self._calls.record(self.model, self.ids[index : index + 1].to(self.device))
                if index == 0:
                    self._hidden = self._allocate(hidden)
                self._hidden[index] = hidden[0]
            for handle in handles:
                handle.remove()
            self.weights.release(outer)

    def _prune_block(self, index: int) -> Iterator[Event]:
        names = [name for name in self.weights.names if name.startswith(f"{self.blocks_name}.{index}.")]
        layers = [layer for layer in self.layers if layer.block == index]
        with self.meter.phase("load"):
            self.weights.load(names)
        if layers:
            passes = plan_passes(layers, _STATISTICS_BYTES.get(self.device.type, 4 << 30))
            # Every pass must see the block as it was, so what the first ones prune is put in place after the last.
            self._held = {} if len(passes) > 1 else None
            for part in passes:
                yield self._event("phase", "statistics", index)
                with gather(part) as groups:
                    yield from self._forward(index, "statistics", keep=False)
                yield from self._solve(part, groups, index)
            for name, weight in (self._held or {}).items():
                self.weights.put(name, weight)
            self._held = None
        yield self._event("phase", "propagate", index)
        if index + 1 < len(self.blocks) or self._tail_layers():
            yield from self._forward(index, "propagate", keep=True)
        self.weights.release(names)
        errors = [r.error_after_compensation for r in self.records if r.error_after_compensation is not None]
        yield self._event("block", "propagate", index, error=sum(errors) / len(errors) if errors else None)

    def _forward(self, index: int, phase: Phase, *, keep: bool) -> Iterator[Event]:
        """Run block ``index`` on all sequences; with ``keep`` its outputs become the next block's inputs."""
        samples, length = self.ids.shape
        size = max(1, _BATCH_TOKENS.get(self.device.type, 4096) // length)
        for first in range(0, samples, size):
            with self.meter.phase(phase):
                output = self._calls.run(index, self._hidden[first : first + size].to(self.device), first)
                if keep:
                    self._hidden[first : first + size] = output
            done = min(first + size, samples)
            yield self._event("progress", phase, index, done=done, total=samples, tokens=done * length)

    def _solve(self, layers: list[LinearLayer], groups: list[InputGroup], index: int | None) -> Iterator[Event]:
        seen = {layer.name for group in groups for layer in group.layers}
        groups = groups + [_unseen(layer, self.device) for layer in layers if layer.name not in seen]
        place = {layer.name: number for number, layer in enumerate(layers)}
        groups.sort(key=lambda group: min(place[layer.name] for layer in group.layers))
        done = 0
        yield self._event("phase", "solve", index, total=len(layers))
        for group in groups:
            check_finite(group)
            with self.meter.phase("solve"):
                inputs = InputStatistics(group.hessian, name=group.layers[0].name, hand_over=True)
            for layer in group.layers:
                record = self._prune_layer(layer, inputs, group.tokens)
                self.records.append(record)
                done += 1
                yield self._event(
                    "layer",
                    "solve",
                    index,
                    done=done,
                    total=len(layers),
                    layer=layer.name,
                    error=record.error_after_compensation,
                )
        groups.clear()

    def _prune_layer(self, layer: LinearLayer, inputs: InputStatistics, tokens: int) -> LayerRecord:
        settings = self.recipe.for_layer(layer.name)
        assert settings is not None
        began = time.perf_counter()
        with self.meter.phase("solve"):
            stored = self.weights.stored(layer.weight_name)
            pruned = prune_layer(layer.oriented(stored), inputs, settings, name=layer.name)
            result = layer.oriented(pruned.weight).contiguous()
        seconds = time.perf_counter() - began
        with self.meter.phase("write"):
            written = result.cpu()
            self.writer.write(self.weights.key(layer.weight_name), written)
            if self._held is None:
                self.weights.put(layer.weight_name, result)
            else:
                self._held[layer.weight_name] = written
        zeros = int((pruned.weight == 0).sum())
        rows, columns = layer.shape
        return LayerRecord(
            name=layer.name,
            block=layer.block,
            shape=(rows, columns),
            dtype=str(stored.dtype).removeprefix("torch."),
            method=pruned.method,
            pattern=settings.pattern,
            sparsity=zeros / (rows * columns),
            zeros=zeros,
            outlier_rows=pruned.outliers.numel(),
            halved_rows=pruned.halved.numel(),
            error_before_compensation=pruned.error_before_compensation,
            error_after_compensation=pruned.error_after_compensation,
            damping=pruned.damping,
            damping_reason=pruned.damping_reason,
            tokens=tokens,
            seconds=seconds,
            warnings=_warnings(pruned, inputs, tokens, settings),
        )

    def _prune_tail(self) -> Iterator[Event]:
        """Prune targeted layers that follow the blocks, such as lm_head, each on the inputs that it now gets."""
        layers = self._tail_layers()
        if not layers:
            return
        outer = self._outer_names()
        self.weights.load(outer)
        for layer in layers:
            yield self._event("phase", "statistics")
            with self.meter.phase("statistics"), gather([layer]) as groups:
                handle = layer.module.register_forward_pre_hook(lambda *_: stop())
                for index in range(len(self.ids)):
                    hidden = self._hidden[index : index + 1].to(self.device)
                    self._calls.run_tail(self.model, self.ids[index : index + 1].to(self.device), hidden)
                handle.remove()
            yield from self._solve([layer], groups, None)
        self.weights.release(outer)

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _tail_layers(self) -> list[LinearLayer]:
        return [layer for layer in self.layers if layer.block is None]

    def _outer_names(self) -> list[str]:
        return [name for name in self.weights.names if not name.startswith(f"{self.blocks_name}.")]

    def _allocate(self, hidden: Tensor) -> Tensor:
        shape = (len(self.ids), *hidden.shape[1:])
        needed = hidden.element_size() * hidden[0].numel() * len(self.ids)
        on_device = self.device.type == "cuda" and needed < _ACTIVATION_SHARE * torch.cuda.mem_get_info(self.device)[0]
        return torch.empty(shape, dtype=hidden.dtype, device=self.device if on_device else "cpu")

    def _event(self, kind: str, phase: Phase, block: int | None = None, **details: object) -> Event:
        seconds = time.perf_counter() - self._began
        return Event(kind=kind, phase=phase, seconds=seconds, block=block, blocks=len(self.blocks), **details)  # type: ignore[arg-type]


def _refuse_early(layer: LinearLayer) -> Callable[..., None]:
    def refuse(*_: object) -> None:
        raise ModelError(f"{layer.name} comes before the decoder blocks; only layers in or after them can be pruned")

    return refuse


def _unseen(layer: LinearLayer, device: torch.device) -> InputGroup:
    columns = layer.shape[1]
    return InputGroup([layer], torch.zeros(columns, columns, device=device))


def _warnings(pruned: PrunedWeight, inputs: InputStatistics, tokens: int, settings: LayerRecipe) -> list[str]:
    """Say what a reader of the report should know about one layer."""
    columns = inputs.matrix.shape[0]
    lines = []
    if pruned.method != settings.method:
        cause = (
            f"all {tokens} calibration tokens were zero here" if tokens else "no calibration token reached this layer"
        )
        lines.append(f"{cause}: pruned by {pruned.method}, not {settings.method}")
    elif 0 < tokens < columns:
        lines.append(
            f"only {tokens} calibration tokens for {columns} input columns: the Hessian is singular but for damping"
        )
    dead = int(inputs.dead.sum())
    if 0 < dead < columns:
        lines.append(f"{dead} of {columns} input columns were never excited")
    if pruned.damping_reason:
        lines.append(f"damping raised to {pruned.damping:g}: {pruned.damping_reason}")
    if pruned.damping is not None:
        condition = inputs.factor(settings.damping).condition()
        if condition > _BAD_CONDITION:
            lines.append(f"the damped Hessian is badly conditioned: condition number about {condition:.1e}")
    return lines
