"""The loop over the decoder blocks: load, stages, propagate, release, finish.

The stages (:mod:`thanos.engine.stages`) do the work on a block, such as pruning its layers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch

from thanos.calibration.statistics import Need, need_of
from thanos.engine.block_error import INHERITED, BlockErrors, BlockMeter
from thanos.engine.dense_stream import DenseStream
from thanos.engine.inputs import EngineInputs
from thanos.engine.layer_warnings import expert_notes
from thanos.engine.output import Output
from thanos.engine.records import BlockRecord, LayerRecord, mean_known
from thanos.engine.stages.base import BlockContext, BlockStage
from thanos.engine.stages.prune import ERROR_SEQUENCES, PruneStage
from thanos.engine.tuning_record import TuningRecord
from thanos.errors import ModelError
from thanos.events import Event
from thanos.model.layers import LinearLayer
from thanos.system.memory import release_free_heap


class Engine:
    """One pruning run over a model. Weights are loaded and released block by block.

    Args:
        inputs: the engine's inputs.
        stages: work on each block, in order.
        notes: warnings from before the loop.

    Attributes:
        records: records of the pruned layers, in order; a block's records are added when it is finished.
        block_errors: errors of the finished blocks that have a dense stream, in order.
        tunings: records of the blocks that were tuned, in order.
        notes: warnings about the whole run.
        tier: storage tier of the activations in the last finished block; empty before.
    """

    def __init__(
        self, inputs: EngineInputs, stages: Sequence[BlockStage] = (PruneStage(),), notes: Sequence[str] = ()
    ) -> None:
        self.inputs, self.stages = inputs, tuple(stages)
        self.records: list[LayerRecord] = []
        self.block_errors: list[BlockErrors] = []
        self.tunings: list[TuningRecord] = []
        self.notes = list(notes)
        self.tier = ""
        self._tail = inputs.layers_of(None)
        self._dense_end = inputs.dense_end
        sequential = any(settings.repair.sequential for settings in inputs.layers.values())
        inputs.runner.boundary = inputs.held_out.start if sequential and inputs.held_out else None
        self._dense = DenseStream(inputs.runner, inputs.weights) if self._dense_end else None

    def run(self, blocks: Collection[int | None] | None = None) -> Iterator[Event]:
        """Prune the model and yield events. Afterwards ``records`` is complete, and every changed tensor is written.

        Args:
            blocks: indices of the blocks to work on, None for the layers after the blocks; default: all. Other blocks are
                skipped: a block's inputs are the outputs of the block before it in ``blocks``, or the first block's inputs.

        Raises:
            NumericsError: weights or activations hold NaN or infinity.
            ResourceError: memory or disk is exhausted.
            ModelError: a targeted layer outside the blocks cannot be pruned.
        """
        inputs = self.inputs
        output = Output(inputs.writer, inputs.world, inputs.device)
        try:
            # Not inference mode: a stage may train a block under `torch.enable_grad()`, which inference tensors do not allow.
            with torch.inference_mode(False), torch.no_grad():
                if self._is_read_after(-1):
                    yield from self._record_calls(BlockContext(inputs, output, None))
                for index in [one for one in range(len(inputs.blocks)) if blocks is None or one in blocks]:
                    context, record = self._context(index, output), inputs.journal.finished.get(index)
                    if record is None:
                        yield from self._work_on_block(context, index, output)
                    else:
                        yield from self._replay_block(context, index, record)
                if blocks is None or None in blocks:
                    yield from self._work_on_tail(output)
        finally:
            for helper in (output, inputs.weights, inputs.runner, *([self._dense] if self._dense else [])):
                helper.close()
        # A method without input statistics gives the same result for any number of tokens: it needs no note.
        observed = [layer for layer, settings in inputs.layers.items() if need_of(settings) > Need.NOTHING]
        experts = {layer.name: layer.expert for layer in observed if layer.expert}
        self.notes += expert_notes(experts, self.records)

    # --- phases -----------------------------------------------------------------------------------------------------

    def _record_calls(self, context: BlockContext) -> Iterator[Event]:
        """Load the modules before the first block and record all calls; see :meth:`Passes.record`."""
        weights = self.inputs.weights
        yield context.event("phase", "calibration")
        with context.meter.phase("calibration"):
            outer = self.inputs.outer_names(head=False)
            weights.load(outer)
            with ExitStack() as hooks:
                for layer in self._tail:
                    hooks.enter_context(layer.module.register_forward_pre_hook(_refuse_early(layer)))
                context.runner.record()
            weights.release(outer)
            if self._dense is not None:
                self._dense.begin()

    def _work_on_block(self, context: BlockContext, index: int, output: Output) -> Iterator[Event]:
        if not self.inputs.runs(index):  # the hidden states do not change
            self._finish(context, output)
            yield context.event("block", "propagate", error=self._mean_error())
            return
        self._load(index)
        context.find_order()
        yield from self._advance_dense(context, index)
        yield from self._run_stages(context)
        yield context.event("phase", "propagate")
        if index + 1 < len(self.inputs.blocks) or self._tail:
            yield from self._propagate(context, index)
        self._release(context, index)
        release_free_heap()
        self._finish(context, output)
        yield context.event("block", "propagate", error=self._mean_error())

    def _work_on_tail(self, output: Output) -> Iterator[Event]:
        """Run the stages on the layers to prune that follow the blocks, such as lm_head."""
        record = self.inputs.journal.finished.get(None)
        if not self._tail:
            return
        if record is not None:
            self._add_record(record)
            return
        context, outer = self._context(None, output), self.inputs.outer_names()
        context.runner.close_branches()
        self.inputs.weights.load(outer)
        if context.dense_stream is not None:
            context.dense_stream.hold(outer)
        yield from self._run_stages(context)
        self.inputs.weights.release(outer)
        self._finish(context, output)

    def _replay_block(self, context: BlockContext, index: int, record: BlockRecord) -> Iterator[Event]:
        """Skip the stages of a finished block: its tensors are on the disk. Compute its outputs if a later block needs them."""
        self._add_record(record)
        if self._is_read_after(index) and self.inputs.runs(index):
            self._load(index)
            yield from self._advance_dense(context, index, record.dense_starts)
            self._take_finished(index)
            yield context.event("phase", "propagate")
            yield from self._propagate(context, index, record.starts)
            self._release(context, index)
            self.notes += context.notes
        context.runner.batch = record.batch  # as after this block in the interrupted run
        yield context.event("block", "propagate", error=self._mean_error(), replayed=True)

    # --- steps ------------------------------------------------------------------------------------------------------

    def _load(self, index: int) -> None:
        """Load a block's weights from the checkpoint, and begin to read those of the next block to run.

        Weights that an interrupted run has finished are not loaded (see :meth:`_take_finished`), unless the dense stream needs
        their dense values.
        """
        inputs = self.inputs
        with inputs.meter.phase("load"):
            inputs.weights.load(self._names_to_load(index))
        later = range(index + 1, len(inputs.blocks))
        after = next((block for block in later if inputs.runs(block)), None)
        if after is not None and not inputs.dropped_after(index):
            inputs.weights.prefetch(self._names_to_load(after))

    def _take_finished(self, index: int) -> None:
        """Set the weights of a block that an interrupted run has finished, from the output."""
        inputs = self.inputs
        with inputs.meter.phase("load"):
            for name in self._finished_names(index):
                inputs.weights.put(name, inputs.writer.read(inputs.weights.key(name)))

    def _advance_dense(
        self, context: BlockContext, index: int, starts: Sequence[tuple[int, int]] = ()
    ) -> Iterator[Event]:
        """Compute the dense block's outputs, if a layer here or later needs the dense stream."""
        if context.dense_stream is None:
            return
        yield context.event("phase", "dense")
        with context.meter.phase("dense"):
            context.dense_stream.hold(self.inputs.block_names(index))
            beyond = {later: self.inputs.block_names(later) for later in self.inputs.dropped_after(index)}
            for step in context.dense_stream.advance(index, starts, beyond):
                yield context.note(step.note, "dense") if step.note else context.progress("dense", step.done)
        inputs, held_out = self.inputs, bool(self.inputs.held_out_of_all)
        sample = range(max(0, min(inputs.runner.shape[0], ERROR_SEQUENCES - inputs.first)))  # the first of the run
        sequences = inputs.held_out if held_out else sample
        context.block_meter = BlockMeter(
            inputs.runner, context.dense_stream, inputs.weights, inputs.world, index, sequences
        )
        context.block_errors = BlockErrors(block=index, held_out=held_out, tokens=0)

    def _release(self, context: BlockContext, index: int) -> None:
        """Free the block's weights. The dense outputs become the next block's inputs; the stream ends if no layer needs it."""
        self.inputs.weights.release(self.inputs.block_names(index))
        if context.dense_stream is not None:
            context.dense_stream.turn()
            if index + 1 >= self._dense_end:
                context.dense_stream.close()

    def _run_stages(self, context: BlockContext) -> Iterator[Event]:
        yield from self._measure(context, INHERITED)
        for stage in self.stages:
            context.stage = stage.name
            yield from stage(context)
            yield from self._measure(context, stage.name)

    def _measure(self, context: BlockContext, name: str) -> Iterator[Event]:
        """Measure the block's error after a stage, if there is a dense stream."""
        if context.block_meter is None or context.block_errors is None:
            return
        with context.meter.phase("dense"):
            error = context.block_meter.error()
        for line in context.block_meter.take_notes():
            yield context.note(line, "dense")
        errors = {**context.block_errors.errors, name: error}
        context.block_errors = replace(context.block_errors, tokens=context.block_meter.tokens, errors=errors)
        yield context.event("stage", "dense", stage=name, error=error)

    def _propagate(self, context: BlockContext, index: int, starts: Sequence[tuple[int, int]] = ()) -> Iterator[Event]:
        """Run the block on all sequences; its outputs become the next block's inputs."""
        with context.meter.phase("propagate"):
            for step in context.runner.propagate(index, starts):
                yield context.note(step.note, "propagate") if step.note else context.progress("propagate", step.done)

    def _finish(self, context: BlockContext, output: Output) -> None:
        """Wait for the block's tensors, then record the block in the journal, and add its records and notes to the run's."""
        with context.meter.phase("write"):
            output.flush()
        runner, dense = context.runner, None if context.index is None else context.dense_stream
        record = BlockRecord(
            block=context.index,
            layers=list(context.records.values()),
            batch=runner.batch,
            starts=list(runner.starts),
            dense_starts=list(dense.starts) if dense else [],
            tier=runner.tier,
            notes=list(context.notes),
            errors=context.block_errors,
            tuning=context.tuning,
        )
        self.inputs.journal.record(record, context.written)
        self._add_record(record)

    def _add_record(self, record: BlockRecord) -> None:
        self.records += record.layers
        self.block_errors += [] if record.errors is None else [record.errors]
        self.tunings += [] if record.tuning is None else [record.tuning]
        self.notes += record.notes
        self.inputs.runner.batch, self.tier = record.batch, record.tier

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _context(self, index: int | None, output: Output) -> BlockContext:
        """Return the context of a block, or of the layers after the blocks, with the dense stream if it is needed there."""
        position = len(self.inputs.blocks) if index is None else index
        return BlockContext(self.inputs, output, index, self._dense if position < self._dense_end else None)

    def _names_to_load(self, index: int) -> list[str]:
        """Return the parameters of a block to read from the checkpoint: all for the dense stream, else those not finished."""
        names = self.inputs.block_names(index)
        if index < self._dense_end:
            return names
        finished = self._finished_names(index)
        return [name for name in names if name not in finished]

    def _finished_names(self, index: int) -> list[str]:
        record = self.inputs.journal.finished.get(index)
        tensors = record.tensors if record is not None else {}
        return [name for name in self.inputs.block_names(index) if self.inputs.weights.key(name) in tensors]

    def _is_read_after(self, index: int) -> bool:
        """Return whether a later block, or a layer after the blocks, is unfinished and so needs these outputs.

        ``index`` is the block; -1 stands for the first block's inputs.
        """
        todo = [*range(index + 1, len(self.inputs.blocks)), *([None] if self._tail else [])]
        return any(block not in self.inputs.journal.finished for block in todo)

    def _mean_error(self) -> float | None:
        return mean_known([record.error_after_compensation for record in self.records])


def _refuse_early(layer: LinearLayer) -> Callable[..., None]:
    def refuse(*_: object) -> None:
        raise ModelError(f"{layer.name} comes before the decoder blocks; only layers in or after them can be pruned")

    return refuse
