"""A trial of a run: one block on a few tokens and one small layer of each kind, timed with the code that prunes."""

from __future__ import annotations

import gc
import hashlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from thanos.calibration.statistics import InputGroup, gather
from thanos.engine.block_runner import Passes
from thanos.engine.picture import Picture
from thanos.engine.weights import ModelWeights
from thanos.model.layers import LinearLayer
from thanos.bench import cost_model as costs
from thanos.bench.device_rates import Rates
from thanos.planning.memory_model import LayerWork
from thanos.solvers.synthetic_layer import synthetic_layer
from thanos.recipe import LayerRecipe
from thanos.solvers.hessian import InputStatistics
from thanos.solvers.prune_layer import prune_layer
from thanos.system.memory import host_bytes, host_peak_bytes, reset_host_peak

T = TypeVar("T")

_PASS_SECONDS = 0.4
"""Approximate seconds of a forward pass of the block."""

_SOLVE_SECONDS = 0.2
"""Approximate seconds to solve one kind of layer, and to check tensors for NaN."""

_FEWEST_TOKENS, _SMALLEST = 32, 64
_DISK_BYTES = 16 << 20


@dataclass(slots=True)
class BlockTrial:
    """Measurements of one block on a few tokens.

    Attributes:
        tokens: number of tokens in the pass.
        hidden_bytes: bytes of one token's hidden state.
        record_seconds: seconds per sequence of the modules before the first block.
        read_rate: rate of loading weights, in bytes/s.
        observe_seconds: seconds per token of the pass that gathers statistics.
        run_seconds: seconds per token of the pass that computes the block's outputs.
        working_bytes: peak bytes of the pass in addition to weights and Hessians, on the device (on the CPU: on the host).
        spared_seconds: seconds per token that batches after the first save, because they end before the last layer's product.
        batch: number of sequences that fit in a pass; None if memory does not limit it.
        groups: groups of layers that share an input, with the statistics of this input.
        weights: layer name → weight of each layer to prune, (c, b), on the device.
    """

    tokens: int
    hidden_bytes: int
    record_seconds: float
    read_rate: float
    observe_seconds: float
    run_seconds: float
    working_bytes: int
    spared_seconds: float
    batch: int | None
    groups: list[InputGroup] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TrialModel:
    """The model and the block of a trial.

    Attributes:
        meta_model: the meta model.
        blocks: its decoder blocks.
        picture: the data flow between its blocks.
        weights: its weights.
        outer: names of the parameters outside the blocks, without those that only the output embedding has.
        index: index of the block to run.
        inside: names of this block's parameters.
        layers: layers of this block whose statistics are gathered.
    """

    meta_model: nn.Module
    blocks: list[nn.Module]
    picture: Picture
    weights: ModelWeights
    outer: list[str]
    index: int
    inside: list[str]
    layers: list[LinearLayer]


def few_tokens(parameters: int, columns: Sequence[int], ids: Tensor, most: int, rates: Rates) -> Tensor:
    """Return token ids, (n, t), for a pass over a block of about ``_PASS_SECONDS``, and at most one batch.

    Args:
        parameters: number of parameters of the block.
        columns: width of each of its Hessians.
        ids: token ids of the whole calibration, (samples, T).
        most: number of sequences in a batch.
        rates: rates of the device.
    """
    # Seconds per token: two operations per parameter, and XᵀX of each input.
    each = 2 * parameters / rates.model_flops + sum(2 * size**2 for size in columns) / rates.gram_flops
    tokens = max(_FEWEST_TOKENS, int(_PASS_SECONDS / each))
    length = min(ids.shape[1], tokens)
    return ids[: max(1, min(most, tokens // length)), :length]


@torch.no_grad()
def try_block(model: TrialModel, ids: Tensor, device: torch.device) -> BlockTrial:
    """Run and measure one block with the engine's code, on token ids (n, t)."""
    weights = model.weights
    passes = Passes(model.meta_model, model.blocks, ids, device, Path(), place="device", picture=model.picture)
    try:
        weights.load(model.outer)
        seconds, _ = _timed(passes.record, device)
        weights.release(model.outer)
        read, _ = _timed(lambda: weights.load(model.inside), device)

        def observe() -> list[InputGroup]:
            with gather(model.layers) as groups:
                for _ in passes.observe(model.index, model.layers):
                    pass
            return groups

        def run() -> None:
            for _ in passes.propagate(model.index):
                pass

        observe()  # warm-up
        with _growth(device) as grown:
            observing, groups = _timed(observe, device)
        running, _ = _timed(run, device)
        nbytes = sum(weights.parameter(name).nbytes for name in model.inside)
        # Batches of a block with experts never end early, so they save nothing.
        last = groups[-1].layers[-1] if groups and not any(layer.expert for layer in model.layers) else None
        hidden, running = passes.state_bytes // ids.numel(), running / ids.numel()
        return BlockTrial(
            tokens=ids.numel(),
            hidden_bytes=hidden,
            record_seconds=seconds / len(ids),
            read_rate=nbytes / read,
            observe_seconds=observing / ids.numel(),
            run_seconds=running,
            working_bytes=max(0, grown[0] - sum(group.hessian.nbytes for group in groups)),
            spared_seconds=0.0 if last is None else running * weights.parameter(last.weight_name).nbytes / nbytes,
            batch=passes.batches_that_fit(model.index) if device.type == "cuda" else None,
            groups=groups,
            weights={layer.name: layer.oriented(weights.parameter(layer.weight_name)) for layer in model.layers},
        )
    finally:
        passes.close()
        weights.release([*model.outer, *model.inside])


def solve_cost(layer: LayerWork, rates: Rates) -> float:
    """Return the modelled seconds of a layer's solve, from its operations and bytes, without the factor."""
    return _model_seconds(layer.rows, layer.columns, layer.settings, rates)


def _model_seconds(rows: int, columns: int, settings: LayerRecipe, rates: Rates) -> float:
    size = min(settings.resolved_block_size, columns)
    parts = costs.solve(settings.method, settings.parsed_pattern, rows, columns, size)
    parts.pop("factor", None)
    return sum(part.seconds(rates.float32_flops, rates.memory_bytes) for part in parts.values())


def time_solve(
    layer: LayerWork, weight: Tensor | None, hessian: Tensor | None, rates: Rates, device: torch.device
) -> tuple[float, float]:
    """Return the seconds of a layer's solve without the factor, and the seconds of the factor.

    Only a corner of the weight is solved if the whole would take too long; the cost model scales the time.

    Args:
        layer: layer of the kind to time.
        weight: stored weight, (c, b); None for a random one.
        hessian: XᵀX of the trial's tokens, (b, b); None for a random one.
        rates: rates of the device.
        device: device on which layers are solved.
    """
    settings, group = layer.settings, layer.settings.parsed_pattern.group
    rows, columns = layer.rows, layer.columns
    while _model_seconds(rows, columns, settings, rates) > _SOLVE_SECONDS and max(rows, columns) > _SMALLEST:
        if rows >= columns:
            rows = max(_SMALLEST, rows // 2)
        else:
            columns = max(_SMALLEST, columns // 2 // group * group)
    if hessian is None or weight is None:
        weight, hessian = synthetic_layer(rows, columns, tokens=max(_SMALLEST, 4 * columns), device=str(device))
    corner = weight[:rows, :columns].contiguous()
    inputs = InputStatistics(hessian[:columns, :columns].clone(), hand_over=True)
    factor = 0.0
    if layer.has_factor and not inputs.empty:
        factor, _ = _timed(lambda: inputs.factor(settings.damping), device)
        factor *= (layer.columns / columns) ** 3
    seconds, _ = _timed(lambda: prune_layer(corner, inputs, settings, name=layer.name), device)
    scale = solve_cost(layer, rates) / _model_seconds(rows, columns, settings, rates)
    return seconds * scale, factor


def write_seconds(folder: Path) -> tuple[float, float]:
    """Return the seconds per byte of a write that is forced to the disk of ``folder``, and of a checksum.

    The write goes to a file without a name, which is deleted when it is closed.
    """
    data, cpu = os.urandom(_DISK_BYTES), torch.device("cpu")
    with tempfile.TemporaryFile(dir=folder) as file:

        def write() -> None:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

        writing, _ = _timed(write, cpu)
    hashing, _ = _timed(lambda: hashlib.blake2b(data, digest_size=16).digest(), cpu)
    return writing / _DISK_BYTES, hashing / _DISK_BYTES


def survey_rate(chunks: Iterator[tuple[str, Tensor]], look: Callable[[str, Tensor], int]) -> float:
    """Return the rate of the NaN check in bytes/s, measured on the first few chunks; infinity without chunks.

    Args:
        chunks: (tensor name, chunk) of the tensors that are not pruned.
        look: the check.
    """
    seen, began = 0, time.perf_counter()
    for name, chunk in chunks:
        look(name, chunk)
        seen += chunk.nbytes
        if time.perf_counter() - began > _SOLVE_SECONDS:
            break
    return seen / max(1e-9, time.perf_counter() - began) if seen else math.inf


def _timed(work: Callable[[], T], device: torch.device) -> tuple[float, T]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, result


@contextmanager
def _growth(device: torch.device) -> Iterator[list[int]]:
    """Yield a list of one number: after the context, the peak growth of memory in bytes.

    It is the device's memory on CUDA, and the process's memory on the CPU.
    """
    grown = [0]
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield grown
        grown[0] = torch.cuda.max_memory_allocated(device) - before
        return
    reset_host_peak()
    before = host_bytes()
    yield grown
    grown[0] = host_peak_bytes() - before
