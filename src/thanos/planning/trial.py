"""A trial of a run: the engine and its stages work on single blocks and few sequences, with the model's weights.

The trial runs the code that prunes, so it covers every stage that the recipe lists. A block runs on two numbers of sequences.
The difference gives the cost per sequence; the rest does not depend on the number of sequences. Output goes to a file without
a name, which the system deletes when it is closed.
"""

from __future__ import annotations

import gc
import hashlib
import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from thanos.checkpoint.entries import count_zeros
from thanos.checkpoint.in_memory import raw_bytes
from thanos.engine.activations import choose_place
from thanos.engine.block_runner import most_sequences
from thanos.engine.records import BlockRecord
from thanos.engine.stages.prune import sampled_sequences
from thanos.errors import NumericsError
from thanos.model.layers import LinearLayer
from thanos.planning.kinds import Job, Kind, Sample
from thanos.recipe import LayerRecipe
from thanos.run.engine_setup import build_engine
from thanos.system.files import write_at
from thanos.system.memory import device_memory, free_device_bytes, give_back, host_bytes
from thanos.system.meter import PhaseMeter

SECONDS = 8.0
"""Seconds after which no further block is tried. Each kind of block is tried once in any case."""

_GOLDEN = 0.618034
"""Fractional parts of its multiples are spread evenly: the tried blocks lie at all depths of the model."""

_COPIED_BYTES = 16 << 20
"""Bytes that are copied to measure the disk."""

_SCAN_SECONDS = 0.2
"""Seconds for which tensors that are not pruned are scanned, to measure the rate."""


@dataclass(frozen=True, slots=True)
class Trial:
    """The result of a trial.

    Attributes:
        kinds: the kinds of blocks, with their samples.
        once: phase → seconds that only the first block takes, in which threads start and kernels are compiled.
        batch: number of sequences in a forward pass of the run.
        place: storage tier of the hidden states in the run.
        state_bytes: bytes of the hidden states of all sequences.
        copy: seconds per byte of a tensor that is copied from the input to the output.
    """

    kinds: list[Kind]
    once: dict[str, float]
    batch: int
    place: str
    state_bytes: int
    copy: float


def run_trial(job: Job) -> Trial:
    """Try blocks of each kind."""
    kinds, cuda = job.kinds(), job.device.type == "cuda"
    heaviest = max((kind.blocks[0] for kind in kinds if kind.blocks[0] is not None), key=job.block_bytes)
    # On CUDA every layer, since its kernels are compiled. On the CPU one small layer, to start the threads.
    layers = {layer: settings for layer, settings in job.prepared.layers.items() if layer.block == heaviest}
    some = layers if cuda else dict(sorted(layers.items(), key=lambda item: item[0].shape)[:1])
    with closing(_Scratch(job.folder)) as scratch:
        cold, warm = (_measure(job, scratch, heaviest, 1, None, job.activations, some) for _ in range(2))
        once = {phase: max(0.0, seconds - warm.seconds.get(phase, 0.0)) for phase, seconds in cold.seconds.items()}
        kept = warm.state_bytes * job.samples
        place = choose_place(kept, job.device, job.folder, job.activations)
        batch = most_sequences(job.samples, job.ids.shape[1], job.device)
        if cold.fits is not None:  # measured without the hidden states of all sequences
            left = 1 - kept / free_device_bytes(job.device) if place == "device" else 1.0
            batch = max(1, min(batch, int(left * cold.fits)))
        each = sum(warm.busy.get(phase, 0.0) for phase in warm.over_sequences - {"calibration"})
        each /= 1 if cuda else torch.get_num_threads()
        size = min(batch, int(SECONDS / (8 * len(kinds) * max(1e-4, each))))
        size = max(size, math.ceil(batch / 4))  # memory is not extrapolated to much larger batches
        few = min(job.samples, max(size, sampled_sequences(job.prepared.layers.values(), job.recipe.measure_error)))
        more = min(job.samples, few + min(batch, 2 * size))
        sizes = (few, size), (more, min(batch, 2 * size))
        began = time.perf_counter()
        for done in count(1):
            for kind in kinds:
                usual = kind.blocks[:-1] or kind.blocks  # the outputs of the last block may not be needed
                block = usual[int(len(usual) * (done * _GOLDEN % 1))]
                first = _measure(job, scratch, block, *sizes[0], place)
                # A run of so few sequences is measured as it is.
                second = first if few == more else _measure(job, scratch, block, *sizes[1], place)
                kind.pairs.append((first, second))
            spent = time.perf_counter() - began
            if spent + spent / done > SECONDS or done >= max(len(kind.blocks) for kind in kinds):
                break
        return Trial(kinds, once, batch, place, kept, _copy_seconds(job, scratch))


def _measure(
    job: Job,
    scratch: _Scratch,
    block: int | None,
    sequences: int,
    batch: int | None,
    place: str,
    layers: dict[LinearLayer, LayerRecipe] | None = None,
) -> Sample:
    """Run the engine on one block and the first sequences.

    Args:
        job: the work of the run.
        scratch: stands for the output.
        block: index of the block; None for the layers after the blocks.
        sequences: number of sequences.
        batch: number of sequences in a forward pass; None to choose it as a run does.
        place: storage tier of the hidden states.
        layers: the layers to prune; default: all.
    """
    cuda, meter = job.device.type == "cuda", _Meter(job.device)
    gc.collect()
    give_back()
    host, device = host_bytes(), device_memory(job.device)[0] if cuda else 0
    scratch.meter = meter
    engine = build_engine(
        job.prepared if layers is None else replace(job.prepared, layers=layers),
        job.recipe,
        job.ids[:sequences],
        job.device,
        job.folder,
        activations=place,
        writer=scratch,  # type: ignore[arg-type]
        journal=scratch,
        meter=meter,
    )
    runner = engine.inputs.runner
    runner.batch = batch
    over = {"calibration"}  # reports no progress
    # If blocks hand values to later ones, the blocks before run too, but are not counted.
    before = [i for i in job.prepared.picture.reached if job.prepared.picture.shares and i < (block or 0)]
    scratch.finished = {i: BlockRecord(block=i, layers=[], tensors={}, batch=batch) for i in before}
    for event in engine.run([*before, block]):
        if event.replayed:
            meter.forget("load", "propagate")
        elif event.tokens:
            over.add(event.phase)
    records, states = meter.records(), runner.state_bytes
    on_host, on_device = (states if runner.place == tier else 0 for tier in ("host", "device"))
    seconds = {phase: record.seconds for phase, record in records.items()}
    return Sample(
        sequences=sequences,
        batch=min(sequences, runner.batch or 1),
        seconds=seconds,
        busy=seconds if cuda else meter.busy,
        peaks={
            phase: (
                max(0, record.host_peak_bytes - host - on_host),
                max(0, (record.device_peak_bytes or 0) - device - on_device),
            )
            for phase, record in records.items()
        },
        over_sequences=frozenset(over),
        state_bytes=states // sequences,
        fits=runner.fits,
    )


class _Meter(PhaseMeter):
    """A meter that also measures the processor's seconds of each phase, in ``busy``."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.busy: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """See :meth:`PhaseMeter.phase`."""
        began = time.process_time()
        with super().phase(name):
            yield
        self.busy[name] = self.busy.get(name, 0.0) + time.process_time() - began

    def forget(self, *names: str) -> None:
        """Start again with the seconds and peaks of phases."""
        for name in names:
            for known in (self.busy, self._seconds, self._host, self._on_device):
                known.pop(name, None)


class _Scratch:
    """Stands for the output and the journal of a run: writes the bytes of tensors to a file without a name.

    Args:
        folder: existing folder on the output's disk.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        self._end = 0
        self.meter: PhaseMeter | None = None
        self.finished: dict[int | None, BlockRecord] = {}

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor's bytes and compute their checksum, as the writer of a run does."""
        del name
        data = raw_bytes(tensor.cpu())
        self.append(data)
        hashlib.blake2b(data, digest_size=16)

    def append(self, data: memoryview) -> None:
        """Write bytes after those since the last :meth:`sync`."""
        write_at(self._file.fileno(), data, self._end)
        self._end += len(data)

    def record(self, block: int | None, **details: object) -> None:
        """Force a block's tensors to the disk, as the journal of a run does."""
        assert self.meter is not None
        with self.meter.phase("write"):
            self.sync()

    def sync(self) -> None:
        """Force all bytes to the disk. Later bytes replace them."""
        os.fsync(self._file.fileno())
        self._end = 0

    def close(self) -> None:
        """Delete the file."""
        self._file.close()


def _copy_seconds(job: Job, scratch: _Scratch) -> float:
    """Return the seconds per byte of a tensor that is copied to the output and forced to the disk."""
    done, began = 0, time.perf_counter()
    for key in job.untouched():
        for span in job.prepared.opened.checkpoint.raw_spans(key):
            scratch.append(span)
            done += len(span)
            if done >= _COPIED_BYTES:
                break
        if done >= _COPIED_BYTES:
            break
    scratch.sync()
    return (time.perf_counter() - began) / max(1, done)


def scan_seconds(job: Job) -> float:
    """Return the seconds per byte of the check of tensors that are not pruned, measured on the largest of them."""
    seen, began = 0, time.perf_counter()
    for key in job.untouched():
        for chunk in job.prepared.opened.checkpoint.chunks(key):
            with suppress(NumericsError):
                count_zeros(key, chunk)
            seen += chunk.nbytes
        if time.perf_counter() - began > _SCAN_SECONDS:
            break
    return (time.perf_counter() - began) / max(1, seen)
