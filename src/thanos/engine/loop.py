"""The loop: block by block, gather statistics, solve, write, and feed the pruned block's outputs to the next.

The name of a method never occurs here; what is done to a layer is its :class:`~thanos.recipe.LayerRecipe`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from thanos.calibration.statistics import InputGroup, check_finite, empty_group, gather, plan_passes, statistics_budget
from thanos.checkpoint.writer import CheckpointWriter
from thanos.engine.block_calls import stop
from thanos.engine.block_runner import Passes
from thanos.engine.distributed import SINGLE, World
from thanos.engine.rank_zero import SharedWriter
from thanos.engine.records import BlockJournal, BlockRecord, LayerRecord, expert_notes, layer_record, mean_known
from thanos.engine.weights import ModelWeights
from thanos.errors import ModelError
from thanos.events import Event, Phase
from thanos.model.layers import LinearLayer, block_names, outer_names
from thanos.recipe import Recipe
from thanos.solvers.hessian import InputStatistics
from thanos.solvers.prune_layer import prune_layer
from thanos.system.background import Background
from thanos.system.memory import give_back
from thanos.system.meter import PhaseMeter
from thanos.system.staging import Staging


@dataclass(slots=True)
class Engine:
    """One pruning run over a model whose weights come in and go out block by block.

    Args:
        model: the meta model.
        blocks_name: full name of the module list that holds the decoder blocks.
        blocks: those blocks.
        layers: the layers to prune.
        weights: the meta model's parameters.
        writer: takes finished tensors.
        ledger: is told of each finished block, and knows those that an interrupted run finished.
        recipe: what to do.
        passes: runs blocks over the calibration sequences.
        device: where blocks run and layers are solved.
        meter: seconds and peak memory by phase.
        world: the processes that share the work; each has its own sequences.

    Attributes:
        records: one per pruned layer, in order.
        notes: warnings about the run as a whole.
        place: where the activations were kept last.
    """

    model: nn.Module
    blocks_name: str
    blocks: list[nn.Module]
    layers: list[LinearLayer]
    weights: ModelWeights
    writer: CheckpointWriter | SharedWriter
    ledger: BlockJournal
    recipe: Recipe
    passes: Passes
    device: torch.device
    meter: PhaseMeter
    world: World = SINGLE
    records: list[LayerRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    place: str = ""
    _held: dict[str, Tensor] | None = None  # pruned weights that the block must not have yet
    _writes: Background = field(init=False)
    _staging: Staging = field(init=False)  # of the thread that writes
    _written: list[str] = field(default_factory=list)  # by the block that is being pruned
    _started_notes: int = 0

    def run(self) -> Iterator[Event]:
        """Do the work; yields events as it goes. Afterwards ``records`` is complete and every tensor is written.

        Raises:
            NumericsError: weights or activations hold NaN or infinity.
            ResourceError: memory or disk is exhausted.
            ModelError: a targeted layer outside the blocks cannot be pruned.
        """
        self._writes = Background("thanos-writer", self.device)
        self._staging = Staging(self.device)
        self._started_notes = len(self.notes)
        try:
            with torch.inference_mode():
                if self._is_read_after(-1):
                    yield from self._record_calls()
                for index in range(len(self.blocks)):
                    record = self.ledger.finished.get(index)
                    yield from self._prune_block(index) if record is None else self._replay_block(index, record)
                yield from self._prune_tail()
        finally:
            for helper in (self._writes, self.weights, self.passes):
                helper.close()
        self.notes += expert_notes({layer.name: layer.expert for layer in self.layers if layer.expert}, self.records)

    # --- phases -----------------------------------------------------------------------------------------------------

    def _record_calls(self) -> Iterator[Event]:
        """Run what comes before the first block, for every sequence; keep that block's inputs and all arguments."""
        yield self._event("phase", "calibration")
        with self.meter.phase("calibration"):
            outer = self._outer_names(head=False)
            self.weights.load(outer)
            handles = [layer.module.register_forward_pre_hook(_refuse_early(layer)) for layer in self._tail_layers()]
            self.passes.record()
            for handle in handles:
                handle.remove()
            self.weights.release(outer)

    def _prune_block(self, index: int) -> Iterator[Event]:
        if not self.passes.reaches(index):
            self._finish(index)
            yield self._event("block", "propagate", index, error=self._mean_error())
            return
        names = self._block_names(index)
        layers = [layer for layer in self.layers if layer.block == index]
        self._load(index)
        if layers:
            parts = plan_passes(layers, statistics_budget(self.device))
            # Every pass must see the block as it was, so what the first ones prune is put in place after the last.
            self._held = {} if len(parts) > 1 else None
            for part in parts:
                yield self._event("phase", "statistics", index)
                with self.meter.phase("statistics"):
                    groups = yield from self._gather(index, part)
                yield from self._solve(part, groups, index)
            for name, weight in (self._held or {}).items():
                self.weights.put(name, weight)
            self._held = None
        yield self._event("phase", "propagate", index)
        if index + 1 < len(self.blocks) or self._tail_layers():
            with self.meter.phase("propagate"):
                yield from self._propagate(index)
        self.weights.release(names)
        give_back()
        self._finish(index)
        yield self._event("block", "propagate", index, error=self._mean_error())

    def _propagate(self, index: int, starts: Sequence[tuple[int, int]] = ()) -> Iterator[Event]:
        for step in self.passes.propagate(index, starts):
            note = isinstance(step, str)
            yield self._note(step, "propagate") if note else self._progress("propagate", index, step)

    def _replay_block(self, index: int, record: BlockRecord) -> Iterator[Event]:
        """Take over a block that is finished; what it was made of is on the disk, and only its outputs may be missing."""
        self._take_over(record)
        if self._is_read_after(index) and self.passes.reaches(index):
            self._load(index)
            yield self._event("phase", "propagate", index)
            with self.meter.phase("propagate"):
                yield from self._propagate(index, record.starts)
            self.weights.release(self._block_names(index))
        self.passes.batch = record.batch  # as it was left then
        yield self._event("block", "propagate", index, error=self._mean_error(), replayed=True)

    def _gather(self, index: int, layers: list[LinearLayer]) -> Generator[Event, None, list[InputGroup]]:
        """Gather the statistics of a block's layers; from the start again, in smaller batches, where memory runs out."""
        while True:
            try:
                self.passes.settle_batch(index)
                with gather(layers) as groups:
                    for done in self.passes.observe(index, layers):
                        yield self._progress("statistics", index, done)
                return groups
            except torch.OutOfMemoryError as error:
                yield self._note(self.passes.halve(error), "statistics")

    def _solve(self, layers: list[LinearLayer], groups: list[InputGroup], index: int | None) -> Iterator[Event]:
        """Prune layers; ``groups`` is emptied on the way, so that each Hessian goes when its layers are done."""
        if self.world.size > 1:
            with self.meter.phase("reduce"):
                groups[:] = self.world.merge(groups, layers, self.device)
        seen = {layer.name for group in groups for layer in group.layers}
        groups += [empty_group([layer], self.device) for layer in layers if layer.name not in seen]
        place = {layer.name: number for number, layer in enumerate(layers)}
        groups.sort(key=lambda group: min(place[layer.name] for layer in group.layers))
        done = 0
        yield self._event("phase", "solve", index, total=len(layers))
        with self.meter.phase("solve"):
            while groups:
                group = groups.pop(0)
                check_finite([group])  # not all at once: a bad weight is named before the bad inputs that it makes
                inputs = InputStatistics(group.hessian, name=group.layers[0].name, hand_over=True)
                for layer in group.layers:
                    record = yield from self._prune_or_spill(layer, inputs, group.tokens)
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

    def _prune_or_spill(
        self, layer: LinearLayer, inputs: InputStatistics, tokens: int
    ) -> Generator[Event, None, LayerRecord]:
        """Prune a layer; where memory runs out, again once the hidden states have left the device."""
        try:
            return self._prune_layer(layer, inputs, tokens)
        except torch.OutOfMemoryError:
            # Alone this process cannot try again: the others would be a step ahead.
            if self.world.size > 1 or self.passes.place != "device":
                raise
        # Not in the handler: while it runs, the error keeps the tensors of what failed.
        line = self.passes.spill()
        assert line is not None
        yield self._note(line, "solve")
        return self._prune_layer(layer, inputs, tokens)

    def _prune_layer(self, layer: LinearLayer, inputs: InputStatistics, tokens: int) -> LayerRecord:
        settings = self.recipe.for_layer(layer.name)
        assert settings is not None
        began = time.perf_counter()
        stored = self.weights.stored(layer.weight_name)
        pruned = prune_layer(layer.oriented(stored), inputs, settings, name=layer.name, peers=self.world)
        result = layer.oriented(pruned.weight).contiguous()
        seconds = time.perf_counter() - began  # the device is done: the record's numbers are here
        record = layer_record(layer, pruned, inputs, settings, stored.dtype, tokens, seconds)
        if self._held is None:
            self.weights.put(layer.weight_name, result)
        else:
            self._held[layer.weight_name] = result = result.cpu()
        key = self.weights.key(layer.weight_name)
        self._written.append(key)
        self._writes.post(self._write, key, result)
        return record

    def _prune_tail(self) -> Iterator[Event]:
        """Prune targeted layers that follow the blocks, such as lm_head, each on the inputs that it now gets."""
        layers, record = self._tail_layers(), self.ledger.finished.get(None)
        if not layers:
            return
        if record is not None:
            self._take_over(record)
            return
        outer = self._outer_names()
        self.weights.load(outer)
        for layer in layers:
            yield self._event("phase", "statistics")
            with self.meter.phase("statistics"), gather([layer]) as groups:
                handle = layer.module.register_forward_pre_hook(lambda *_: stop())
                for done in self.passes.run_tail():
                    yield self._progress("statistics", None, done)
                handle.remove()
            yield from self._solve([layer], groups, None)
        self.weights.release(outer)
        self._finish(None)

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _load(self, index: int) -> None:
        """Bring a block's weights in, those that are pruned already from the output, and begin to read the next block's."""
        pruned = self._finished_names(index)
        with self.meter.phase("load"):
            self.weights.load([name for name in self._block_names(index) if name not in pruned])
            for name in pruned:
                self.weights.put(name, self.writer.read(self.weights.key(name)))
        after = next((later for later in range(index + 1, len(self.blocks)) if self.passes.reaches(later)), None)
        if after is not None:
            ahead = self._finished_names(after)
            self.weights.prefetch([name for name in self._block_names(after) if name not in ahead])

    def _finished_names(self, index: int) -> list[str]:
        record = self.ledger.finished.get(index)
        tensors = record.tensors if record is not None else {}
        return [name for name in self._block_names(index) if self.weights.key(name) in tensors]

    def _finish(self, block: int | None) -> None:
        """Let the ledger note a block: what was written, and what the report and the next blocks need to know."""
        with self.meter.phase("write"):
            self._writes.flush()
        self.ledger.record(
            block,
            layers=[record for record in self.records if record.block == block],
            written=self._written,
            notes=self.notes[self._started_notes :],
            batch=self.passes.batch,
            starts=self.passes.starts,
            place=self.passes.place,
        )
        self._written.clear()
        self.place = self.passes.place
        self._started_notes = len(self.notes)

    def _take_over(self, record: BlockRecord) -> None:
        self.records += record.layers
        self.notes += record.notes
        self.passes.batch, self.place = record.batch, record.place
        self._started_notes = len(self.notes)

    def _is_read_after(self, index: int) -> bool:
        """Tell whether anything is yet to be done on the outputs of block ``index``, or of a later one."""
        todo = [*range(index + 1, len(self.blocks)), *([None] if self._tail_layers() else [])]
        return any(block not in self.ledger.finished for block in todo)

    def _mean_error(self) -> float | None:
        return mean_known([record.error_after_compensation for record in self.records])

    def _tail_layers(self) -> list[LinearLayer]:
        return [layer for layer in self.layers if layer.block is None]

    def _block_names(self, index: int) -> list[str]:
        return block_names(self.weights.names, self.blocks_name, index)

    def _outer_names(self, *, head: bool = True) -> list[str]:
        return outer_names(self.model, self.weights.names, self.blocks_name, head=head)

    def _write(self, key: str, result: Tensor) -> None:
        if self.world.rank == 0:  # the others write nothing, and so need no copy on the host
            self.writer.write(key, self._staging.fetch(result) if result.is_cuda else result)

    def _progress(self, phase: Phase, index: int | None, done: int) -> Event:
        samples, length = self.passes.shape
        return self._event("progress", phase, index, done=done, total=samples, tokens=done * length)

    def _note(self, message: str, phase: Phase) -> Event:
        self.notes.append(message)
        return self._event("note", phase, message=message)

    def _event(self, kind: str, phase: Phase, block: int | None = None, **details: object) -> Event:
        return Event(kind=kind, phase=phase, block=block, blocks=len(self.blocks), **details)  # type: ignore[arg-type]


def _refuse_early(layer: LinearLayer) -> Callable[..., None]:
    def refuse(*_: object) -> None:
        raise ModelError(f"{layer.name} comes before the decoder blocks; only layers in or after them can be pruned")

    return refuse
