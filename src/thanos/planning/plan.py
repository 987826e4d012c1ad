"""Prediction of a pruning run, before it begins: memory, disk space and time, and which of them do not suffice.

Seconds and memory come from a trial on the device (trial.py). The code that prunes also opens the model, reads the
calibration text and chooses the storage tier here, so this prediction refuses whatever a run would refuse. Two exceptions: not
all weights are checked for NaN, and an interrupted run of OUT is only a note.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from thanos._version import __version__
from thanos.calibration.making import calibrate
from thanos.calibration.windows import Calibration, check_is_calibration
from thanos.checkpoint.writer import disk_shortage
from thanos.engine.activations import check_tier
from thanos.errors import RecipeError, resource_errors
from thanos.events import Event, Watcher
from thanos.model.layers import find_blocks
from thanos.model.source import find_local, resolve_model
from thanos.planning.allocation import allocation_seconds, stream_bytes
from thanos.planning.generating import generated_text
from thanos.planning.kinds import Job, block_seconds
from thanos.planning.scratch import scan_seconds
from thanos.planning.trial import Trial, run_trial
from thanos.recipe import Recipe
from thanos.run.allocation import PHASE as ALLOCATION
from thanos.run.auxiliary_files import auxiliary_files
from thanos.run.cut_plan import planned_cut
from thanos.run.settling import forecast
from thanos.run.setup import (
    bytes_besides,
    check_calibration,
    check_text_settings,
    checked_recipe,
    prepare,
    smaller_calibration,
)
from thanos.run.work_folder import WorkFolder, check_output, interrupted_line
from thanos.system.device import choose_device
from thanos.system.documents import Document
from thanos.system.files import free_disk_bytes
from thanos.system.memory import free_device_bytes, free_host_bytes, host_bytes, release_free_heap
from thanos.system.meter import PhaseMeter, PhaseRecord
from thanos.system.ranks import launched
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
        activations_bytes: bytes of the hidden states of all sequences, those of the dense model included, and of the inputs of
            branches that are kept (:mod:`thanos.engine.branches`).
        batch: number of sequences in a forward pass.
        disk_bytes: bytes of the output's weights, which are reserved before the work begins; the largest number if units or
            blocks are chosen in the run.
        disk_besides_bytes: bytes of the auxiliary files, the journal and the report, and of hidden states kept on the disk.
        disk_free_bytes: free bytes on the output's disk.
        host_peak_bytes: peak resident memory of the process, in bytes.
        host_base_bytes: the part of it without the model: Python, torch, transformers, the tokenizer.
        host_free_bytes: host memory that is still free, in addition to what this process holds, in bytes.
        device_peak_bytes: peak memory of the CUDA device, in bytes; None without one.
        device_free_bytes: free memory of the CUDA device, in bytes; None without one.
        phases: predicted seconds and peak memory, by phase.
        seconds: seconds of all phases together.
        cut: the predicted cut, see :func:`~thanos.run.cut_plan.planned_cut`; empty unless the pattern removes units.
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
    cut: dict[str, Any] = field(default_factory=dict)
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
    """Predict memory, disk space and time of :func:`~thanos.prune` with the same arguments. Nothing is left on the disk.

    An interrupted run of ``out`` is not changed, and a note says that the prediction is of a whole run.

    Raises:
        UserError: :func:`~thanos.prune` would refuse the arguments. Too little memory or disk space is no error here.
    """
    recipe, model, out = checked_recipe(recipe), model_name(model), output_path(out)
    watch = on_event or (lambda event: None)
    if launched():
        raise RecipeError("a plan is made for one process; run it without torchrun")
    check_tier(activations)
    check_is_calibration(calibration)
    local = find_local(model, trust_remote_code=recipe.trust_remote_code)
    work = WorkFolder(out)
    check_output(out, model=Path(model) if local else None, overwrite=overwrite)
    if not overwrite and (line := interrupted_line(work)):  # a run would be refused, but a plan changes nothing
        watch(Event(kind="note", phase="load", message=f"the plan is of a whole run; {line}"))
    check_calibration(recipe, calibration)
    device = choose_device(recipe.device)
    meter = PhaseMeter(device)
    with resource_errors(smaller_calibration(recipe)):
        with meter.phase("load"):
            source = resolve_model(model, trust_remote_code=recipe.trust_remote_code)
            if calibration is None:
                check_text_settings(source, recipe)
            check_calibration(recipe, calibration, source)
            prepared = forecast(prepare(source, recipe, watch, look=False))
        job = Job(prepared, recipe, device, torch.empty(0), _existing(work.out.parent), activations)
        generates = calibration is None and (recipe.calibration == "self" or recipe.generate > 0)
        with meter.phase("calibration"):
            if generates:
                ids, generating = generated_text(job, watch)
            else:
                ids, generating = calibrate(prepared.opened, recipe, device, watch, calibration).ids, None
        with meter.phase("load"):
            scan = scan_seconds(job)
        measured = meter.records()
        if generating is not None:
            measured["calibration"] = replace(measured["calibration"], seconds=generating)
        return _predict(replace(job, ids=ids), work.out, measured, scan, job.block_bytes(None) if generates else 0)


def _predict(job: Job, out: Path, measured: dict[str, PhaseRecord], scan: float, generating: int) -> Plan:
    """Run the trial and compute the prediction.

    ``measured`` are the phases that this process has already run: ``load`` and ``calibration``. ``scan`` is the seconds per
    byte of the check of tensors that are not pruned, ``generating`` the bytes of the model that generates the calibration
    text.
    """
    trial = run_trial(job)
    gc.collect()
    release_free_heap()
    base, cuda = host_bytes(), job.device.type == "cuda"
    seconds, measuring = _seconds(job, trial, scan), stream_bytes(job, trial.allocation)
    for name in measured:
        seconds[name] += measured[name].seconds
    memory = {name: _memory(name, trial, base, measured, generating, cuda, measuring) for name in seconds}
    phases = {
        name: PhaseRecord(
            seconds=seconds[name], host_peak_bytes=memory[name][0], device_peak_bytes=memory[name][1] if cuda else None
        )
        for name in seconds
    }
    opened = job.prepared.opened
    layout = opened.checkpoint.layout
    cut = {} if job.prepared.cutting is None else planned_cut(opened, job.prepared.cutting)
    weights = max(one["bytes_after"] for one in cut.get("splits", [cut])) if cut else layout.nbytes
    besides = bytes_besides(job.prepared.layers) + len(layout.index or b"")
    besides += sum(path.stat().st_size for path in auxiliary_files(opened.source))
    besides += max(trial.states.get("disk", 0), measuring.get("disk", 0))
    host = max(one for one, _ in memory.values())
    on_device = max(one for _, one in memory.values()) if cuda else None
    free = free_disk_bytes(job.folder), free_host_bytes(), free_device_bytes(job.device) if cuda else None
    lines = [
        disk_shortage(weights + besides, free[0], out.parent),
        _memory_shortage("host", host - base, free[1], "--samples, or give --activations disk"),
        _memory_shortage("device", on_device or 0, free[2] or 0, "--sequence-length, or use --device cpu"),
    ]
    return Plan(
        thanos_version=__version__,
        recipe=job.recipe.to_dict(),
        device=str(job.device),
        blocks=len(find_blocks(opened.meta_model)[1]),
        layers=len(job.prepared.layers),
        activations=trial.tier,
        activations_bytes=sum(trial.states.values()) + sum(trial.branches.values()),
        batch=trial.batch,
        disk_bytes=weights,
        disk_besides_bytes=besides,
        disk_free_bytes=free[0],
        host_peak_bytes=host,
        host_base_bytes=base,
        host_free_bytes=free[1],
        device_peak_bytes=on_device,
        device_free_bytes=free[2],
        phases=phases,
        seconds=sum(seconds.values()),
        does_not_fit=[line for line in lines if line],
        cut=cut,
    )


def _memory(
    name: str,
    trial: Trial,
    base: int,
    measured: dict[str, PhaseRecord],
    generating: int,
    cuda: bool,
    measuring: dict[str, int],
) -> tuple[int, int]:
    """Return the peak bytes of a phase on host and device: of the process (``base``), a block, and the hidden states."""
    if name == ALLOCATION:
        peaks = [kind.peak(phase, trial.batch) for kind in trial.allocation for phase in kind.phases]
    else:
        peaks = [kind.peak(name, trial.batch) for kind in trial.kinds]
    host, on_device = (max(peak[i] for peak in peaks) for i in (0, 1))
    states = [] if name == "finish" else [measuring if name == ALLOCATION else trial.states]
    if any(kind.keeps_branches(name) for kind in trial.kinds):
        states.append(trial.branches)
    host += base + sum(one.get("host", 0) for one in states)
    on_device += sum(one.get("device", 0) for one in states)
    if name == "calibration" and generating:  # the whole model is in memory
        host, on_device = (host, max(on_device, generating)) if cuda else (max(host, base + generating), 0)
    if name in measured:
        host = max(host, measured[name].host_peak_bytes)
        on_device = max(on_device, measured[name].device_peak_bytes or 0)
    return host, on_device


def _seconds(job: Job, trial: Trial, scan: float) -> dict[str, float]:
    """Return the seconds of each phase, without what this process has already done."""
    tensors = job.prepared.opened.checkpoint.tensors
    untouched = sum(tensors[key].nbytes for key in job.untouched())
    seconds = {"load": untouched * scan, "calibration": 0.0}
    if trial.allocation:
        seconds[ALLOCATION] = allocation_seconds(job, trial.allocation)
    for name, value in block_seconds(job, trial.kinds, job.amount).items():
        seconds[name] = seconds.get(name, 0.0) + value
    for name, value in trial.once.items():
        seconds[name] = seconds.get(name, 0.0) + value
    return seconds | {"finish": untouched * trial.copy}


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def _memory_shortage(where: str, needed: int, free: int, lower: str) -> str:
    if needed <= free:
        return ""
    return f"out of memory on the {where}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB free; lower {lower}"
