"""``thanos bench model``: seconds of pruning a model with random weights, and a lower bound of them on the device."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from thanos import registry
from thanos.bench.device_rates import Rates, measure_rates
from thanos.bench.measure import machine
from thanos.bench.synthetic import RandomCheckpoint, Shape, random_checkpoint
from thanos.calibration.generation import SEEDS
from thanos.checkpoint.writer import CheckpointWriter
from thanos.engine.block_runner import Passes
from thanos.engine.inputs import EngineInputs
from thanos.engine.loop import Engine
from thanos.engine.records import LayerRecord, NoJournal, mean_known
from thanos.engine.stages.prune import observed_fractions
from thanos.engine.weights import ModelWeights
from thanos.events import Event
from thanos.model.layers import find_blocks, linear_layers, select_layers
from thanos.recipe import Recipe
from thanos.run.engine_setup import held_out_here, stages_of
from thanos.run.journal import Journal
from thanos.run.resume import RunJournal
from thanos.system.documents import Document
from thanos.system.event_stream import EventStream
from thanos.system.meter import PhaseMeter, PhaseRecord

SCHEMA = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelTime(Document):
    """The result of :func:`time_model`; the attributes are the keys of ``--json``.

    Attributes:
        shape: shape of the whole model.
        recipe: the recipe as plain values.
        blocks: number of measured blocks.
        seconds: seconds of the measured run, from the first calibration sequence to the last written tensor.
        block_seconds: seconds of each measured block, in order.
        whole_seconds: estimated seconds of the whole model. A block that was not measured counts as the median block.
        phases: seconds and peak memory of the measured run, by phase.
        solve_seconds: kind of linear layer → seconds of its solves, summed over the blocks.
        floor_seconds: lower bound of the measured blocks' seconds, by phase: operations and bytes divided by ``rates``, without
            overlap.
        rates: rates of this device, measured in the same run.
        mean_error: mean relative output error of the layers after compensation.
        batch: number of sequences in a forward pass.
        activations: storage tier of the hidden states.
        written: whether the result was written to a disk.
        machine: hardware, versions, commit and date.
        schema: version of this format.
    """

    shape: Shape
    recipe: dict[str, Any]
    blocks: int
    seconds: float
    block_seconds: list[float]
    whole_seconds: float
    phases: dict[str, PhaseRecord]
    solve_seconds: dict[str, float]
    floor_seconds: dict[str, float]
    rates: Rates
    mean_error: float | None
    batch: int | None
    activations: str
    written: bool
    machine: dict[str, Any]
    schema: int = SCHEMA


class _Discard:
    """A writer that discards the tensors once they are in host memory."""

    def write(self, name: str, tensor: Tensor) -> None:
        """Discard one tensor."""


def time_model(
    shape: Shape,
    recipe: Recipe,
    device: torch.device,
    *,
    blocks: int | None = None,
    out: Path | None = None,
    activations: str = "auto",
    on_event: Callable[[Event], None] | None = None,
) -> ModelTime:
    """Prune a model with random weights, and time it.

    Args:
        shape: shape of the model.
        recipe: method, pattern, samples and sequence length.
        device: device of the run.
        blocks: number of blocks to measure, from the first; default: all.
        out: folder for a temporary result, removed afterwards; default: results are copied to host memory and discarded.
        activations: see :func:`thanos.prune`.
        on_event: function that is called with each event.
    """
    part = replace(shape, blocks=min(blocks or shape.blocks, shape.blocks))
    rates = measure_rates(device, torch.bfloat16)
    meter, ended = PhaseMeter(device), list[float]()
    emit = EventStream(on_event, meter)
    with _engine(part, recipe, device, meter, out=out, activations=activations) as engine:
        for event in engine.run():
            if event.kind == "block":
                ended.append(sum(phase.seconds for phase in meter.records().values()))
            emit(event)
    phases = meter.records()
    seconds = sum(phase.seconds for phase in phases.values())
    before = phases["calibration"].seconds
    each = [end - begin for begin, end in zip([before, *ended], ended, strict=False)]
    return ModelTime(
        shape=shape,
        recipe=recipe.to_dict(),
        blocks=part.blocks,
        seconds=seconds,
        block_seconds=each,
        whole_seconds=seconds + (shape.blocks - part.blocks) * statistics.median(each),
        phases=phases,
        solve_seconds=_by_kind(engine.records),
        floor_seconds=floor_seconds(part, recipe, rates),
        rates=rates,
        mean_error=mean_known([record.error_after_compensation for record in engine.records]),
        batch=engine.inputs.runner.batch,
        activations=engine.inputs.runner.tier,
        written=out is not None,
        machine=machine(str(device)),
    )


@contextmanager
def _engine(
    shape: Shape, recipe: Recipe, device: torch.device, meter: PhaseMeter, *, out: Path | None, activations: str
) -> Iterator[Engine]:
    """Yield an engine for random weights and random tokens; its output is removed afterwards."""
    meta_model, checkpoint = random_checkpoint(shape, recipe.sequence_length, seed=recipe.seed % SEEDS)
    generator = torch.Generator().manual_seed(recipe.seed % SEEDS)
    ids = torch.randint(shape.vocabulary, (recipe.samples, recipe.sequence_length), generator=generator)
    layers, _ = select_layers(linear_layers(meta_model), recipe)
    name, modules = find_blocks(meta_model)
    for key in checkpoint.tensors:  # generate the tensors before timing, since a real checkpoint exists before the run
        checkpoint.read(key)
    with TemporaryDirectory(dir=out) as scratch:
        writer, journal = _output(checkpoint, Path(scratch), meter, kept=out is not None)
        yield Engine(
            EngineInputs(
                model=meta_model,
                blocks_name=name,
                blocks=modules,
                layers=layers,
                weights=ModelWeights(meta_model, checkpoint, {key: key for key in checkpoint.tensors}, device),
                writer=writer,
                journal=journal,
                runner=Passes(meta_model, modules, ids, device, Path(scratch), tier=activations),
                device=device,
                meter=meter,
                **held_out_here(recipe, len(ids), range(len(ids))),
            ),
            stages_of(recipe),
        )


def _by_kind(records: Sequence[LayerRecord]) -> dict[str, float]:
    """Return kind of layer → seconds of its solves; the kind is the last part of the layer's name."""
    solve: dict[str, float] = {}
    for record in records:
        kind = record.name.rsplit(".", 1)[-1]
        solve[kind] = solve.get(kind, 0.0) + record.seconds
    return solve


def _output(checkpoint: RandomCheckpoint, folder: Path, meter: PhaseMeter, *, kept: bool) -> tuple[Any, Any]:
    """Return the writer and the journal: those of a real run if ``kept``, else ones that discard everything."""
    if not kept:
        return _Discard(), NoJournal()
    writer = CheckpointWriter(checkpoint.layout, checkpoint, folder)
    return writer, RunJournal(Journal(folder / "journal.jsonl"), writer, meter)


def floor_seconds(shape: Shape, recipe: Recipe, rates: Rates) -> dict[str, float]:
    """Return a lower bound of the seconds of each phase at the measured rates, for all linear layers of all blocks.

    - load and write: copies of the blocks' bytes between host and device.
    - statistics: all products of a block except the last, whose result is not needed; causal attention; XᵀX of the block's four
      inputs. Each is counted for the sequences for which the method needs it.
    - solve, for methods with a factor: a Cholesky factor of H⁻¹ per input (⅔ b³), and a product of the weight with a triangular
      b × b matrix per layer (c b²).
    - solve, for the errors: three times half a product of c × b by b × b (c b² each); twice for methods without compensation.
    - propagate: products and attention of all blocks except the last.
    """
    tokens, layers = recipe.samples * recipe.sequence_length, shape.layers
    weights = sum(rows * columns for rows, columns in layers.values())
    attention = 2.0 * tokens * recipe.sequence_length * shape.hidden  # QKᵀ and PV, each 2·T·T·d, half of it masked
    last = shape.intermediate * shape.hidden
    inputs = (shape.hidden, shape.hidden, shape.hidden, shape.intermediate)
    gram = sum(2.0 * tokens * columns**2 for columns in inputs)
    run, gathered = observed_fractions([recipe], recipe.measure_error, recipe.samples)
    method = registry.method(recipe.method)
    solve = sum((3.0 if method.compensates else 2.0) * rows * columns**2 for rows, columns in layers.values())
    if method.needs_factor:
        solve += sum(2 / 3 * columns**3 for columns in inputs)
        solve += sum(1.0 * rows * columns**2 for rows, columns in layers.values())
    forward = (2.0 * tokens * weights + attention) / rates.model_flops
    return {
        "load": shape.blocks * 2 * weights / rates.to_device_bytes,
        "statistics": shape.blocks
        * (run * (forward - 2.0 * tokens * last / rates.model_flops) + gathered * gram / rates.gram_flops),
        "solve": shape.blocks * solve / rates.float32_flops,
        "propagate": (shape.blocks - 1) * forward,
        "write": shape.blocks * 2 * weights / rates.to_device_bytes,
    }
