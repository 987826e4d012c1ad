"""What a stage is, and what it gets to work with: one decoder block, its layers and its calibration sequences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from torch import Tensor, nn

from thanos.engine.inputs import EngineInputs
from thanos.engine.output import Output
from thanos.engine.records import LayerRecord
from thanos.events import Event, Phase
from thanos.model.layers import LinearLayer


class BlockStage(Protocol):
    """One thing to do to every block, while its weights are in memory and before its outputs are computed.

    A stage is called once for each block, and once for what follows the blocks if layers are pruned there. Its result may
    depend on the context alone, so that a run that was interrupted goes on to the same bytes: a stage that draws at random
    seeds a generator of its own by the block's index.
    """

    @property
    def name(self) -> str:
        """Name in the records."""
        ...

    def __call__(self, context: BlockContext) -> Iterator[Event]:
        """Work on a block; yields events as it goes."""
        ...


class BlockContext:
    """One decoder block, or what follows the blocks, as the stages see it, one after another.

    Everything runs without gradients. A stage that trains opens ``torch.enable_grad()``, and hands its result to :meth:`put`.

    The hidden states of the calibration sequences are those of the model pruned so far, before this block: the pruned stream.
    A dense stream, the hidden states of the model as it came, would be a second runner beside :attr:`runner`, with a method
    like :meth:`batches` of its own.

    Args:
        inputs: of the engine.
        output: takes finished tensors.
        index: of the block; None for what follows the blocks.

    Attributes:
        index: see above.
        module: the block; the model for what follows the blocks.
        layers: the layers to prune here, each with its settings.
        runner: runs this process's calibration sequences.
        weights: parameters of the model, by name.
        device: where the weights are.
        meter: seconds and peak memory by phase.
        world: the processes that share the work.
        stage: name of the stage that is running.
        records: of the layers pruned so far, by name.
        notes: warnings that arose here.
        written: names in the checkpoint of the tensors written so far.
    """

    def __init__(self, inputs: EngineInputs, output: Output, index: int | None) -> None:
        self.index = index
        self.module: nn.Module = inputs.model if index is None else inputs.blocks[index]
        self.layers = inputs.layers_of(index)
        self.runner, self.weights = inputs.runner, inputs.weights
        self.device, self.meter, self.world = inputs.device, inputs.meter, inputs.world
        self.stage = ""
        self.records: dict[str, LayerRecord] = {}
        self.notes: list[str] = []
        self.written: list[str] = []
        self._output, self._blocks = output, len(inputs.blocks)

    # --- calibration sequences --------------------------------------------------------------------------------------

    def batches(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (number of the first sequence, inputs of the block (≤ size, T, d) on the device): the pruned stream.

        They are the runner's own memory and must not be modified.
        """
        return self.runner.batches(size)

    def forward(self, hidden: Tensor, first: int) -> Tensor:
        """Return the block's outputs, (B, T, d), for inputs (B, T, d) of the sequences from ``first`` on.

        The block is as it is now. Not for what follows the blocks.
        """
        assert self.index is not None, "what follows the blocks is no block"
        return self.runner.run(self.index, hidden, first)

    def observe(self, layers: Sequence[LinearLayer], most: int | None = None) -> Iterator[int]:
        """Run the block on all sequences for the hooks on ``layers`` alone; yields the number of sequences done.

        With ``most`` it ends after the batch in which so many are done.

        What follows the blocks is run as far as a single layer.
        """
        if self.index is not None:
            return self.runner.observe(self.index, layers, most)
        (layer,) = layers
        return self.runner.observe_tail(layer, most)

    # --- weights ----------------------------------------------------------------------------------------------------

    def dense(self, name: str) -> Tensor:
        """Return a parameter as the checkpoint came, in its stored dtype, on the device; read anew. Not to be modified."""
        return self.weights.stored(name)

    def kept(self, layer: LinearLayer) -> Tensor:
        """Return which weights of a layer are not zero now, (c, b) bool: where pruning let them stay."""
        return layer.oriented(self.weights.parameter(layer.weight_name) != 0)

    def put(self, name: str, value: Tensor) -> None:
        """Set a parameter, wherever the block holds it, and write it to the output, both rounded to its stored dtype.

        The record of a layer that was pruned before counts its zeros anew and names the stage.
        """
        value = value.detach().to(self.weights.stored_dtype(name)).contiguous()
        self.write(name, value)
        self.place(name, value)
        record = self.records.get(name.removesuffix(".weight"))
        if record is not None:
            zeros = value.numel() - int(value.count_nonzero())
            self.records[record.name] = replace(
                record, zeros=zeros, sparsity=zeros / value.numel(), changed_by=[*(record.changed_by or []), self.stage]
            )

    def write(self, name: str, value: Tensor) -> None:
        """Begin to write a parameter to the output, contiguous and in its stored dtype; the block keeps what it has."""
        key = self.weights.key(name)
        if key not in self.written:
            self.written.append(key)
        self._output.write(key, value)

    def place(self, name: str, value: Tensor) -> None:
        """Set a parameter, wherever the block holds it; the output keeps what it has."""
        self.weights.put(name, value)

    # --- what is told -----------------------------------------------------------------------------------------------

    def add_record(self, record: LayerRecord) -> None:
        """Take the record of a layer that was pruned."""
        self.records[record.name] = record

    def note(self, message: str, phase: Phase) -> Event:
        """Keep a line that a person should read; return its event."""
        self.notes.append(message)
        return self.event("note", phase, message=message)

    def progress(self, phase: Phase, done: int, most: int | None = None) -> Event:
        """Return the event that says how many of this process's sequences are done, of all or of ``most``."""
        samples, length = self.runner.shape
        total = samples if most is None else max(done, min(samples, most))
        return self.event("progress", phase, done=done, total=total, tokens=done * length)

    def event(self, kind: str, phase: Phase, **details: object) -> Event:
        """Return an event of this block."""
        return Event(kind=kind, phase=phase, block=self.index, blocks=self._blocks, **details)  # type: ignore[arg-type]
