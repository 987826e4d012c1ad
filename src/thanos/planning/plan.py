"""Prediction of a pruning run, before it begins: memory, disk space and time, and which of them do not suffice.

Bytes come from shapes, dtypes and the recipe (memory_model.py), plus the present memory of this process. Seconds come from a
trial of a few seconds on the device (trial.py). The code that prunes also opens the model, reads the calibration text and
chooses the storage tier here, so this prediction refuses what a run would refuse. Only weights are not checked for NaN.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thanos._version import __version__
from thanos.calibration.windows import Calibration, calibrate, check_positions
from thanos.checkpoint.entries import count_zeros
from thanos.checkpoint.writer import disk_shortage
from thanos.engine.activations import check_place, choose_place
from thanos.engine.block_runner import most_sequences
from thanos.engine.distributed import launched
from thanos.engine.weights import ModelWeights
from thanos.errors import RecipeError, resource_errors
from thanos.events import Watcher
from thanos.model.layers import LinearLayer, find_blocks
from thanos.model.loading import context_length
from thanos.model.source import find_local, resolve_model
from thanos.bench.device_rates import Rates, measure_rates
from thanos.planning.memory_model import LayerWork
from thanos.planning.phases import Job, Pace, inner_name, phase_bytes, phase_seconds, transfer_bytes
from thanos.planning.trial import BlockTrial, TrialModel, few_tokens, survey_rate, time_solve, try_block, write_seconds
from thanos.recipe import Recipe
from thanos.run.auxiliary_files import auxiliary_files
from thanos.run.setup import (
    LOG_BYTES_PER_LAYER,
    Prepared,
    check_calibration,
    check_text_settings,
    checked_recipe,
    prepare,
    smaller_calibration,
)
from thanos.run.work_folder import WorkFolder, check_interrupted, check_output
from thanos.system.device import choose_device
from thanos.system.documents import Document
from thanos.system.files import free_disk_bytes
from thanos.system.memory import free_device_bytes, free_host_bytes, host_bytes
from thanos.system.meter import PhaseMeter, PhaseRecord
from thanos.system.user_paths import model_name, output_path

SCHEMA = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan(Document):
    """The prediction of a run; the attributes are the keys of ``thanos prune --plan --json``.

    Attributes:
        thanos_version: version of the package that made the prediction.
        recipe: the recipe, as plain values.
        device: device of the run.
        blocks: number of decoder blocks.
        layers: number of layers to prune.
        activations: storage tier of the hidden states between blocks.
        activations_bytes: bytes of the hidden states of all sequences.
        batch: number of sequences in a forward pass.
        disk_bytes: bytes of the output's weights, which are reserved before the work begins.
        disk_besides_bytes: bytes of the auxiliary files, the journal and the report, and of hidden states kept on the disk.
        disk_free_bytes: free bytes on the output's disk.
        host_peak_bytes: peak resident memory of the process, in bytes.
        host_base_bytes: the part of it without the model: Python, torch, transformers, the tokenizer.
        host_free_bytes: host memory that is still free, in addition to what this process holds, in bytes.
        device_peak_bytes: peak memory of the CUDA device, in bytes; None without one.
        device_free_bytes: free memory of the CUDA device, in bytes; None without one.
        phases: predicted seconds and peak memory, by phase.
        seconds: seconds of all phases together.
        does_not_fit: one line for each resource that does not suffice; empty if the run fits.
        schema: version of this format.
    """

    thanos_version: str
    recipe: dict[str, Any]
    device: str
    blocks: int
    layers: int
    activations: str
    activations_bytes: int
    batch: int
    disk_bytes: int
    disk_besides_bytes: int
    disk_free_bytes: int
    host_peak_bytes: int
    host_base_bytes: int
    host_free_bytes: int
    device_peak_bytes: int | None
    device_free_bytes: int | None
    phases: dict[str, PhaseRecord]
    seconds: float
    does_not_fit: list[str]
    schema: int = SCHEMA


def plan(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    overwrite: bool = False,
    activations: str = "auto",
    on_event: Watcher | None = None,
    calibration: Calibration | None = None,
) -> Plan:
    """Predict memory, disk space and time of :func:`~thanos.prune` with the same arguments. Nothing is written.

    Raises:
        UserError: :func:`~thanos.prune` would refuse the arguments. Too little memory or disk space is no error here.
    """
    recipe, model, out = checked_recipe(recipe), model_name(model), output_path(out)
    watch = on_event or (lambda event: None)
    if launched():
        raise RecipeError("a plan is made for one process; run it without torchrun")
    check_place(activations)
    local = find_local(model, trust_remote_code=recipe.trust_remote_code)
    work = WorkFolder(out)
    check_interrupted(work, resume=False, overwrite=overwrite)
    check_output(out, model=Path(model) if local else None, overwrite=overwrite)
    check_calibration(recipe, calibration)
    device = choose_device(recipe.device)
    meter = PhaseMeter(device)
    with resource_errors(smaller_calibration(recipe)):
        with meter.phase("load"):
            source = resolve_model(model, trust_remote_code=recipe.trust_remote_code)
            if calibration is None:
                check_text_settings(source, recipe)
            check_calibration(recipe, calibration, source)
            prepared = prepare(source, recipe, watch, look=False)
        with meter.phase("calibration"):
            if recipe.calibration == "self" and calibration is None:
                ids = _stand_in(prepared, recipe)
            else:
                ids = calibrate(prepared.opened, recipe, device, watch, calibration).ids
        return _predict(Job(prepared, recipe, device, ids), work, activations, meter.records())


def _stand_in(prepared: Prepared, recipe: Recipe) -> Tensor:
    """Return random ids, (samples, T), instead of the text that the model would generate."""
    check_positions(recipe.sequence_length, context_length(prepared.opened.source.config()))
    generator = torch.Generator().manual_seed(recipe.seed)
    vocabulary = prepared.opened.meta_model.get_input_embeddings().get_parameter("weight").shape[0]
    return torch.randint(vocabulary, (recipe.samples, recipe.sequence_length), generator=generator)


def _measure(job: Job, folder: Path, measured: dict[str, PhaseRecord]) -> tuple[BlockTrial, Pace]:
    """Run the trial of one block and of one layer of each kind, and measure the disk. Their tensors are freed afterwards."""
    opened, device = job.prepared.opened, job.device
    meta_model, (_, blocks) = opened.meta_model, find_blocks(opened.meta_model)
    rates = measure_rates(device, meta_model.dtype)
    index = job.largest_block()
    layers = (job.gathered(index) or [[]])[0]
    # On CUDA one whole sequence: it also measures how many sequences fit in a batch.
    few = job.ids[:1] if job.on_cuda else _few_tokens(job, index, layers, rates)
    weights = ModelWeights(meta_model, opened.checkpoint, opened.key_of, device)
    try:
        inside, picture = job.inside(index), job.prepared.picture
        model = TrialModel(meta_model, blocks, picture, weights, job.outer(head=False), index, inside, layers)
        trial = try_block(model, few, device)
    finally:
        weights.close()
    hessians = {layer.name: group.hessian for group in trial.groups for layer in group.layers}
    job.shared = {inner_name(layer): number for number, group in enumerate(trial.groups) for layer in group.layers}
    kinds: dict[Any, LayerWork] = {}
    for part in (*job.all_parts(), *job.parts(None)):
        for work in part:
            if work.kind not in kinds or (work.name in hessians and kinds[work.kind].name not in hessians):
                kinds[work.kind] = work
    solves = {
        kind: time_solve(work, trial.weights.get(work.name), hessians.get(work.name), rates, device)
        for kind, work in kinds.items()
    }
    trial.groups.clear()
    trial.weights.clear()
    write, checksum = write_seconds(folder)
    look = survey_rate(job.untouched_chunks(), count_zeros)
    return trial, Pace(rates, solves, look, write, checksum, measured["load"].seconds, measured["calibration"].seconds)


def _few_tokens(job: Job, index: int, layers: list[LinearLayer], rates: Rates) -> Tensor:
    parameters = job.block_bytes[index] // job.prepared.opened.meta_model.dtype.itemsize
    most = most_sequences(*job.shape, job.device)
    return few_tokens(parameters, [layer.shape[1] for layer in layers], job.ids, most, rates)


def _predict(job: Job, work: WorkFolder, asked: str, measured: dict[str, PhaseRecord]) -> Plan:
    """Run the trial and compute the prediction.

    Args:
        job: the work of the run.
        work: work folder of the output.
        asked: storage tier of the hidden states, or ``auto``.
        measured: phases that this process has already run and measured: ``load`` and ``calibration``.
    """
    folder = _existing(work.out.parent)
    trial, pace = _measure(job, folder, measured)
    gc.collect()
    base = host_bytes()
    batch = most_sequences(*job.shape, job.device)
    batch = batch if trial.batch is None else max(1, min(batch, trial.batch))
    kept = trial.hidden_bytes * job.tokens
    place = choose_place(kept, job.device, folder, asked)
    phases = _phases(job, trial, pace, batch, base, kept, place, measured)
    opened = job.prepared.opened
    layout = opened.checkpoint.layout
    besides = LOG_BYTES_PER_LAYER * len(job.prepared.layers) + len(layout.index or b"")
    besides += sum(path.stat().st_size for path in auxiliary_files(opened.source))
    besides += kept if place == "disk" else 0
    host = max(record.host_peak_bytes for record in phases.values())
    on_device = max(record.device_peak_bytes or 0 for record in phases.values()) if job.on_cuda else None
    free = free_disk_bytes(folder), free_host_bytes(), free_device_bytes(job.device) if job.on_cuda else None
    lines = [
        disk_shortage(layout.nbytes + besides, free[0], work.out.parent),
        _memory_shortage("host", host - base, free[1], "--samples, or give --activations disk"),
        _memory_shortage("device", on_device or 0, free[2] or 0, "--sequence-length, or use --device cpu"),
    ]
    return Plan(
        thanos_version=__version__,
        recipe=job.recipe.to_dict(),
        device=str(job.device),
        blocks=len(job.block_bytes),
        layers=len(job.prepared.layers),
        activations=place,
        activations_bytes=kept,
        batch=batch,
        disk_bytes=layout.nbytes,
        disk_besides_bytes=besides,
        disk_free_bytes=free[0],
        host_peak_bytes=host,
        host_base_bytes=base,
        host_free_bytes=free[1],
        device_peak_bytes=on_device,
        device_free_bytes=free[2],
        phases=phases,
        seconds=sum(record.seconds for record in phases.values()),
        does_not_fit=[line for line in lines if line],
    )


_WITH_STATES = ("calibration", "statistics", "solve", "write", "propagate")


def _phases(
    job: Job,
    trial: BlockTrial,
    pace: Pace,
    batch: int,
    base: int,
    kept: int,
    place: str,
    measured: dict[str, PhaseRecord],
) -> dict[str, PhaseRecord]:
    held = phase_bytes(job, trial, batch)
    records = {}
    for name, seconds in phase_seconds(job, trial, pace, batch).items():
        states = kept if name in _WITH_STATES else 0
        there = held[name] + (states if place == "device" else 0)
        host = base + (states if place == "host" else 0) + (transfer_bytes(job) if job.on_cuda else there)
        # To generate the calibration text, the whole model is in memory.
        if name == "calibration" and job.recipe.calibration == "self" and not job.on_cuda:
            host = max(host, base + job.whole_bytes())
        if name in measured:  # this process has opened the model and read the text itself
            host = max(host, measured[name].host_peak_bytes)
        records[name] = PhaseRecord(
            seconds=seconds, host_peak_bytes=host, device_peak_bytes=there if job.on_cuda else None
        )
    return records


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def _memory_shortage(where: str, needed: int, free: int, lower: str) -> str:
    if needed <= free:
        return ""
    return f"out of memory on the {where}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB free; lower {lower}"
