"""The protocol of a stage, and its context: one decoder block, its layers and its calibration sequences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

from torch import Tensor, nn

from thanos.engine.block_error import BlockErrors, BlockMeter
from thanos.engine.branches import BlockOrder, Branch, block_order
from thanos.engine.dense_stream import DenseStream
from thanos.engine.inputs import EngineInputs
from thanos.engine.output import Output
from thanos.engine.records import LayerRecord
from thanos.engine.tuning_record import TuningRecord
from thanos.events import Event, Phase
from thanos.model.layers import LinearLayer


class BlockStage(Protocol):
    """One step of the work on every block. It runs while the block's weights are in memory, before its outputs are computed.

    A stage is called once for each block, and once for the modules after the blocks if layers are pruned there. Its result
    must depend only on the context, so that a resumed run gives the same bytes. A stage that needs random numbers seeds its
    own generator with the block's index.
    """

    @property
    def name(self) -> str:
        """Name of the stage in the records."""
        ...

    def __call__(self, context: BlockContext) -> Iterator[Event]:
        """Work on a block, and yield events."""
        ...


class BlockContext:
    """The context of the stages: one decoder block, or the modules after the blocks. All stages of a block share it.

    Everything runs without gradients. A stage that trains opens ``torch.enable_grad()``, and passes its result to :meth:`put`.

    The hidden states of the calibration sequences are the inputs of this block in the model pruned so far: the pruned stream.
    If a layer's repair needs it, there is a dense stream too: the hidden states of the unpruned model, X*, and a dense version
    of the block, F*, with the weights of the checkpoint. A stage must not modify a parameter in place: the dense version may
    share its memory.

    Args:
        inputs: the engine's inputs.
        output: writer of finished tensors.
        index: index of the block; None for the modules after the blocks.
        dense_stream: the dense stream; None if no layer here or later needs it.

    Attributes:
        module: the block; the whole model if ``index`` is None.
        layers: the layers to prune here, each with its settings.
        runner: forward passes over this process's calibration sequences.
        weights: parameters of the model, by name.
        prefix: beginning of the names of the block's modules and parameters; empty if ``index`` is None.
        parameter_names: names of the block's parameters and persistent buffers; empty if ``index`` is None.
        device: device of the weights.
        meter: meter of seconds and peak memory by phase.
        world: the processes that share the work.
        held_out: indices of this process's sequences that are held out: the last of the run. Their error selects the dense
            target and the tuned state, so the tuning must not train on them. With several processes, a process may have only
            held-out sequences, or none.
        block_meter: measures the block's error, on the held-out sequences if there are any; None without a dense stream.
        block_errors: the block's error after each stage so far; None without a dense stream.
        stage: name of the running stage.
        records: layer name → record of each layer pruned so far.
        tuning: record of the block's tuning; None if it was not tuned.
        notes: warnings that arose here.
        written: names in the checkpoint of the tensors written so far.
        order: dependencies, calls and branches of the block's layers; None before :meth:`find_order`, and if no layer is
            ``sequential``.
        stands_for_more: whether the pruned model leaves out the blocks right after this one and there is a dense stream. The
            dense outputs are then those of the last block left out.
    """

    def __init__(
        self, inputs: EngineInputs, output: Output, index: int | None, dense_stream: DenseStream | None = None
    ) -> None:
        self.index = index
        self.module: nn.Module = inputs.model if index is None else inputs.blocks[index]
        self.layers = inputs.layers_of(index)
        self.runner, self.weights = inputs.runner, inputs.weights
        self.device, self.meter, self.world = inputs.device, inputs.meter, inputs.world
        self.dense_stream, self.held_out = dense_stream, inputs.held_out
        self.block_meter: BlockMeter | None = None
        self.block_errors: BlockErrors | None = None
        self.order: BlockOrder | None = None
        self.stage = ""
        self.records: dict[str, LayerRecord] = {}
        self.tuning: TuningRecord | None = None
        self.notes: list[str] = []
        self.written: list[str] = []
        self.stands_for_more = index is not None and dense_stream is not None and bool(inputs.dropped_after(index))
        self.prefix = "" if index is None else f"{inputs.blocks_name}.{index}."
        self.parameter_names = [] if index is None else inputs.block_names(index)
        self._output, self._blocks, self._outer_names = output, len(inputs.blocks), inputs.outer_names

    def find_order(self) -> None:
        """Find the block's :class:`~thanos.engine.branches.BlockOrder` if a layer is ``sequential``.

        Then the block runs several times, and from now on the inputs of its branches' last layers are kept; see
        :mod:`thanos.engine.branches`.
        """
        branches: Sequence[Branch] = ()
        if any(settings.repair.sequential for settings in self.layers.values()):
            hidden, layers = self.first_sequence(), list(self.layers)
            self.order = self.world.from_first(
                lambda: block_order(lambda: self.forward(hidden, 0), self.module, layers, self.prefix)
            )
            branches = () if self.runner.shares else self.order.branches
        for stream in (self.runner, self.dense_stream):
            if stream is not None:
                stream.branches.begin(self.module, branches, self.prefix)

    # --- calibration sequences --------------------------------------------------------------------------------------

    def batches(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (index of the batch's first sequence, inputs of the block (≤ size, T, d) on the device): the pruned stream.

        The inputs may be a view of the runner's storage. Do not modify them.
        """
        return self.runner.batches(size)

    def pairs(self, size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (index of the batch's first sequence, pruned inputs X̂, dense inputs X*), each (≤ size, T, d), on the device.

        Only with a dense stream. Do not modify the inputs, which may be views of the storage.
        """
        dense = self._stream.inputs(size)
        for (first, hidden), (_, wanted) in zip(self.batches(size), dense, strict=True):
            yield first, hidden, wanted

    def targets(self, size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (index of the batch's first sequence, pruned inputs X̂, dense outputs F*(X*)), each (≤ size, T, d).

        Only with a dense stream, for decoder blocks. The outputs were computed before the first stage. Do not modify either.
        """
        outputs = self._stream.outputs(size)
        for (first, hidden), (_, wanted) in zip(self.batches(size), outputs, strict=True):
            yield first, hidden, wanted

    def targets_of(self, batches: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield, for each list of sequences, the block's inputs and the dense block's outputs, both (B, T, d) on the device.

        The same pairs as those of :meth:`targets`, in any order. The next ones are read ahead.
        """
        return zip(self.runner.gather(batches), self._stream.gather_outputs(batches), strict=True)

    def forward(self, hidden: Tensor, first: int | Sequence[int]) -> Tensor:
        """Return the block's outputs, (B, T, d), for inputs (B, T, d) of the sequences from ``first`` on, or of those listed.

        The block runs with its current weights. Only for decoder blocks: ``index`` must not be None.
        """
        assert self.index is not None, "the modules after the blocks are not a block"
        return self.runner.run(self.index, hidden, first)

    def dense_forward(self, hidden: Tensor, first: int) -> Tensor:
        """Return the dense block's outputs, (B, T, d), for inputs (B, T, d) of the sequences from ``first`` on.

        It has no gradients. Only with a dense stream, for decoder blocks.
        """
        assert self.index is not None, "the modules after the blocks are not a block"
        return self._stream.run(self.index, hidden, first)

    @property
    def _stream(self) -> DenseStream:
        assert self.dense_stream is not None, "no layer's repair needs the dense stream"
        return self.dense_stream

    def first_sequence(self) -> Tensor:
        """Return the block's inputs for this process's first sequence, (1, T, d)."""
        return next(hidden for _, hidden in self.batches(1))

    @property
    def on_device(self) -> bool:
        """Whether hidden states of a stream are kept on the device; see :meth:`spill`."""
        dense = "" if self.dense_stream is None else self.dense_stream.tier
        return "device" in (self.runner.tier, dense)

    def spill(self) -> list[str]:
        """Move the hidden states of both streams off the device; return the notes for the user."""
        lines = [self.runner.spill(), None if self.dense_stream is None else self.dense_stream.spill()]
        return [line for line in lines if line is not None]

    def observe(self, layers: Sequence[LinearLayer], most: int | None = None) -> Iterator[int]:
        """Run the block on all sequences only for the hooks on ``layers``; yield the number of finished sequences.

        With ``most``, stop after the batch that brings the finished sequences to this number.

        For the modules after the blocks, ``layers`` must be a single layer, and the pass ends at its input.
        """
        if self.index is not None:
            return self.runner.observe(self.index, layers, most, self.order.calls if self.order else ())
        (layer,) = layers
        return self.runner.observe_tail(layer, most)

    @contextmanager
    def outer_weights(self) -> Iterator[None]:
        """Inside the context, the modules before and after the blocks have their weights."""
        names = self._outer_names()
        self.weights.load(names)
        try:
            yield
        finally:
            self.weights.release(names)

    # --- weights ----------------------------------------------------------------------------------------------------

    def dense(self, name: str) -> Tensor:
        """Return a parameter with its value in the input checkpoint, in its stored dtype, on the device. Do not modify it."""
        return self.weights.stored(name)

    def kept(self, layer: LinearLayer) -> Tensor:
        """Return the mask of a layer's current non-zero weights, (c, b) bool: after pruning, the kept weights."""
        return layer.oriented(self.weights.parameter(layer.weight_name) != 0)

    def put(self, name: str, value: Tensor) -> None:
        """Set a parameter in all modules that hold it, and write it to the output; both are rounded to its stored dtype.

        If the layer has a record already, its zeros are counted again and the stage's name is added.
        """
        value = value.detach().to(self.weights.stored_dtype(name)).contiguous()
        self.write(name, value)
        self.assign(name, value)
        record = self.records.get(name.removesuffix(".weight"))
        if record is not None:
            zeros = value.numel() - int(value.count_nonzero())
            self.records[record.name] = replace(
                record, zeros=zeros, sparsity=zeros / value.numel(), changed_by=[*(record.changed_by or []), self.stage]
            )

    def write(self, name: str, value: Tensor) -> None:
        """Begin to write a parameter, contiguous and in its stored dtype, to the output. The block's value does not change."""
        key = self.weights.key(name)
        if key not in self.written:
            self.written.append(key)
        self._output.write(key, value)

    def removes(self, layer: str, units: Sequence[int]) -> None:
        """Note for the output that a layer loses units, before its weight is written."""
        self._output.removes(layer, units)

    def assign(self, name: str, value: Tensor) -> None:
        """Set a parameter in all modules that hold it. The output does not change."""
        self.runner.branches.changed(name)
        self.weights.put(name, value)

    # --- records and events -----------------------------------------------------------------------------------------

    def add_record(self, record: LayerRecord) -> None:
        """Add the record of a pruned layer."""
        self.records[record.name] = record

    def add_choice(self, layers: Sequence[LinearLayer], errors: Mapping[float, float]) -> None:
        """Add the choice of a dense target, the error by candidate, to the block's record. Do nothing outside the blocks."""
        if self.block_errors is None:
            return
        choice = {
            "layers": [layer.name for layer in layers],
            "errors": {f"{a:g}": error for a, error in errors.items()},
        }
        self.block_errors = replace(self.block_errors, choices=[*self.block_errors.choices, choice])

    def note(self, message: str, phase: Phase) -> Event:
        """Add a warning for the user; return its event."""
        self.notes.append(message)
        return self.event("note", phase, message=message)

    def progress(self, phase: Phase, done: int, most: int | None = None) -> Event:
        """Return the event with the number of this process's finished sequences, out of all or of ``most``."""
        samples, length = self.runner.shape
        total = samples if most is None else max(done, min(samples, most))
        return self.event("progress", phase, done=done, total=total, tokens=done * length)

    def event(self, kind: str, phase: Phase, **details: object) -> Event:
        """Return an event of this block."""
        return Event(kind=kind, phase=phase, block=self.index, blocks=self._blocks, **details)  # type: ignore[arg-type]
