"""Running cells, one after another, in one process on one device; what several cells need is made once and kept."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from thanos._version import __version__
from thanos.bench.measure import synthetic_layer
from thanos.calibration import Calibration
from thanos.errors import ModelError, NumericsError, RecipeError, ResourceError, UserError
from thanos.evaluation import Reference, cut_windows, evaluate
from thanos.events import Event
from thanos.inspection import inspect_checkpoint
from thanos.memory import PhaseMeter, free_device_bytes, free_host_bytes, memory_explained
from thanos.preparing import make_calibration
from thanos.pretrained import choose_device, load_model, resolve_model
from thanos.pruning import prune
from thanos.recipe import Recipe
from thanos.report import PhaseRecord, PruningReport
from thanos.solvers import prune_layer
from thanos.solvers.factor import InputStatistics
from thanos.structure import LinearLayer, build_skeleton, linear_layers, select_layers
from thanos.study.formula import measure_layer
from thanos.study.grid import DENSE, FORMULA, Cell, Study, public, public_cell
from thanos.study.store import CellRecord, cell_key
from thanos.text import evaluation_rows

_KEEP_SHARE = 0.25
"""Share of the free memory that the dense model's kept states may take: what is left must hold two models and their logits."""

_KEPT = (
    "text", "text_sha256", "sequence_length", "windows", "tokens", "perplexity", "mean_loss", "kl_divergence",
    "top1_agreement",
)  # fmt: skip
"""What a record has of an evaluation."""

_PACKAGES = ("torch", "transformers", "safetensors", "lm_eval")

Watcher = Callable[[Event], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Where things are on this machine; none of it enters the store but the hashes.

    Attributes:
        out: the study's folder.
        models: name in the study → what to give ``prune``.
        texts: name in the study → source or path.
        task_folder: of local tasks; None without one.
        tasks_hash: sha256 of the files in it and of those they name; None without one.
        hashes: name in the study → sha256 of the model or text; None where there is no file.
        failures: models that cannot be had, and why.
        commit: of the source tree; None where unknown.
    """

    out: Path
    models: dict[str, str]
    texts: dict[str, str]
    task_folder: str | None
    tasks_hash: str | None
    hashes: dict[str, str | None]
    failures: dict[str, str]
    commit: str | None

    @property
    def scratch(self) -> Path:
        """Where pruned models lie until they are measured."""
        return self.out / "scratch"

    def sources(self, study: Study, cell: Cell) -> dict[str, str | None]:
        """Return the hashes of the files that a cell depends on."""
        return {
            "model": self.hashes.get(cell.model),
            "calibration": None if cell.calibration is None else self.hashes.get(cell.calibration),
            "text": None if cell.model in study.cost_only else self.hashes.get(study.evaluation.text),
            "tasks": self.tasks_hash if cell in study.zero_shot_cells else None,
        }

    def without_paths(self, text: str) -> str:
        """Return a message in one line, without the folders of this machine."""
        found = {
            path for path in [*self.models.values(), *self.texts.values(), self.task_folder or ""] if os.sep in path
        }
        folders = {str(Path(path).parent) for path in found} | {str(self.out.resolve()), str(self.out)}
        for folder in sorted(folders - {"/", "."}, key=len, reverse=True):
            text = text.replace(f"{folder}{os.sep}", "")
        return " ".join(text.split())


class Session:
    """Runs the cells of a study on one device.

    Args:
        study: the study.
        places: where its models and texts are.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        sharers: workers that share the device's memory, this one included.
    """

    def __init__(self, study: Study, places: Places, device: str, *, sharers: int = 1) -> None:
        self._study, self._places = study, places
        self._device, self._name = choose_device(device), device
        self._sharers = sharers
        self._reference: tuple[str, Reference] | None = None
        self._calibration: dict[str, Calibration] = {}
        self._layers: dict[str, list[LinearLayer]] = {}
        self._met: set[object] = set()

    def run(self, cell: Cell, tell: Watcher) -> CellRecord:
        """Run one cell; whatever goes wrong becomes the reason of a failed record, which keeps what was measured before."""
        results: dict[str, Any] = {}
        try:
            if cell.model in self._places.failures:
                raise ModelError(self._places.failures[cell.model])
            kinds = {DENSE: self._dense, FORMULA: self._formula}
            kinds.get(cell.method, self._pruned)(cell, results, tell)
        except Exception as error:
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            if isinstance(error, ResourceError | torch.OutOfMemoryError | MemoryError):
                self._reference = None  # the next cell may need its room
            results |= {"status": "failed", "reason": self._places.without_paths(reason)}
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return make_record(self._study, self._places, cell, self._device, results, sharers=self._sharers)

    # --- the kinds of cells: each adds what it has measured to the results at once, so that no later failure loses it -----

    def _dense(self, cell: Cell, results: dict[str, Any], tell: Watcher) -> None:
        model = self._places.models[cell.model]
        totals = inspect_checkpoint(model).totals
        results["effective_sparsity"] = {"targeted": totals["sparsity_targeted"], "all": totals["sparsity_all"]}
        results["phases"] = {}
        self._measure(cell, model, results, tell)

    def _pruned(self, cell: Cell, results: dict[str, Any], tell: Watcher) -> None:
        source = self._places.texts.get(cell.calibration or "", cell.calibration)
        recipe = cell.recipe(calibration=source, device=self._name, dtype=self._study.dtype)
        self._warm_up(cell, recipe)
        key = cell_key(public_cell(cell), self._study.asked(cell))
        folder = self._places.out / "models" if self._study.keep_models else self._places.scratch
        model = folder / key[:16]
        try:
            report = prune(
                self._places.models[cell.model],
                model,
                recipe,
                overwrite=True,
                on_event=tell,
                calibration=self._windows(cell, recipe, tell),
            )
            results |= _pruning(report, public(cell.calibration or ""))
            self._measure(cell, str(model), results, tell)
        finally:
            if not self._study.keep_models:
                shutil.rmtree(model, ignore_errors=True)

    def _formula(self, cell: Cell, results: dict[str, Any], tell: Watcher) -> None:
        plan = self._study.formula
        assert plan is not None
        source = self._places.texts.get(cell.calibration or "", cell.calibration)
        windows = self._windows(cell, cell.recipe(calibration=source, device=self._name, dtype=self._study.dtype), tell)
        opened = resolve_model(self._places.models[cell.model])
        model = load_model(opened, dtype=self._study.dtype, device=self._device)

        def progress(done: int, total: int) -> None:
            tell(Event(kind="progress", phase="statistics", done=done, total=total))

        meter = PhaseMeter(self._device)
        with meter.phase("formula"):
            found = measure_layer(
                model, windows.ids, plan.layer, share=plan.share, damping=cell.damping or 0.0, on_progress=progress
            )
        results |= {"formula": found, "phases": _phases(meter.records())}

    def _measure(self, cell: Cell, model: str, results: dict[str, Any], tell: Watcher) -> None:
        """Add what is asked for to the results, and its phases to theirs, those of a failure included."""
        if self._study.asked(cell)["evaluation"] is None:
            return
        meter = PhaseMeter(self._device)
        try:
            self._score(cell, model, results, meter, tell)
        finally:
            results["phases"] |= _phases(meter.records())

    def _score(self, cell: Cell, model: str, results: dict[str, Any], meter: PhaseMeter, tell: Watcher) -> None:
        tasks = self._study.asked(cell)["zero_shot"]
        with meter.phase("reference"):
            reference = self._shared_reference(cell)
        tell(Event(kind="phase", phase="evaluate"))
        network = reference.model if cell.method == DENSE else None
        with meter.phase("evaluate"):
            if network is None:
                with memory_explained(self._device):
                    network = load_model(resolve_model(model), dtype=self._study.dtype, device=self._device)
            found = evaluate(model, reference=reference, network=network, on_event=tell)
        values = found.to_dict()
        if not math.isfinite(found.perplexity):
            raise NumericsError(f"the perplexity is infinite: the mean loss is {found.mean_loss:.4g} nats per token")
        results["evaluation"] = {name: values[name] for name in _KEPT}
        if tasks is None:
            return
        from thanos.harness import zero_shot

        with meter.phase("zero_shot"):
            scores = zero_shot(model, **tasks, task_folder=self._places.task_folder, network=network, on_event=tell)
        results["zero_shot"] = {"tasks": scores.to_dict()["tasks"], "average": scores.to_dict()["average"]}

    def _warm_up(self, cell: Cell, recipe: Recipe) -> None:
        """Load libraries and compile kernels before the seconds of a cell are recorded, rather than at its expense.

        Kernels are compiled for shapes, patterns and block sizes, so a made-up layer of each of the model's shapes is solved
        as the recipe says, unless an earlier cell has had it solved so.
        """
        if cell.model not in self._layers:
            self._forward_once(cell)
            source = resolve_model(self._places.models[cell.model])
            self._layers[cell.model] = linear_layers(build_skeleton(source.config(), torch.float32))
        if not compiles(self._device):
            return
        for layer in select_layers(self._layers[cell.model], recipe)[0]:
            settings = recipe.for_layer(layer.name)
            if settings is None or (layer.shape, settings) in self._met:
                continue
            self._met.add((layer.shape, settings))
            weight, hessian = synthetic_layer(*layer.shape, tokens=4 * layer.shape[1], device=str(self._device))
            inputs = InputStatistics(hessian, hand_over=True)
            with suppress(RecipeError):  # prune says it better, naming the layer
                prune_layer(weight, inputs, settings)
                weight[::8, ::8] = 0.0  # zeros, as dequantised weights have, take kernels of their own
                prune_layer(weight, inputs, settings)

    def _forward_once(self, cell: Cell) -> None:
        """Run the dense model on one window: of the evaluation, or of nothing where it is not evaluated."""
        if cell.model in self._study.cost_only:
            opened = resolve_model(self._places.models[cell.model])
            model: Any = load_model(opened, dtype=self._study.dtype, device=self._device)
            with torch.inference_mode():
                model(input_ids=torch.zeros(1, cell.sequence_length or 1, dtype=torch.long, device=self._device))
            return
        reference = self._shared_reference(cell)
        if reference.model is not None:
            with torch.inference_mode():
                reference.logits(0, reference.windows[:1].to(self._device))

    # --- shared work ----------------------------------------------------------------------------------------------------

    def _shared_reference(self, cell: Cell) -> Reference:
        """Return the evaluation windows and the dense model of a cell; those of the last model are kept."""
        if self._reference is not None and self._reference[0] == cell.model:
            return self._reference[1]
        self._reference = None
        plan, source = self._study.evaluation, resolve_model(self._places.models[cell.model])
        model = load_model(source, dtype=self._study.dtype, device=self._device)
        rows = evaluation_rows(self._places.texts[plan.text])
        windows = cut_windows(
            "\n\n".join(rows), source.tokenizer(), model, plan.text, plan.sequence_length, plan.max_windows
        )
        reference = Reference(text=public(plan.text), windows=windows)
        if plan.compare:
            free = free_host_bytes() if self._device.type == "cpu" else free_device_bytes(self._device)
            room = int(_KEEP_SHARE * free) // self._sharers
            reference = replace(reference, dense=public(cell.model), model=model, keep_bytes=room)
        self._reference = (cell.model, reference)
        return reference

    def _windows(self, cell: Cell, recipe: Recipe, tell: Watcher) -> Calibration:
        """Return the calibration windows of a cell, from this process, from the study's cache, or made now."""
        shaping = {
            "model": self._places.hashes[cell.model],
            "calibration": self._places.hashes.get(cell.calibration or "") or cell.calibration,
            "shape": [cell.samples, cell.sequence_length, cell.seed],
            "generated_in": self._study.dtype if cell.calibration == "self" else None,
            "version": [__version__, self._places.commit],
        }
        key = hashlib.sha256(json.dumps(shaping).encode()).hexdigest()
        if key not in self._calibration:
            path = self._places.out / "cache" / f"calibration-{key[:24]}.safetensors"
            made = _read_windows(path, recipe.calibration)
            if made is None:
                made = make_calibration(resolve_model(self._places.models[cell.model]), recipe, self._device, tell)
                _write_windows(path, made)
            self._calibration[key] = made
        return self._calibration[key]


def compiles(device: torch.device) -> bool:
    """Whether kernels are compiled for a device when they are first used."""
    return device.type == "cuda"


def make_record(
    study: Study, places: Places, cell: Cell, device: torch.device, results: dict[str, Any], *, sharers: int = 1
) -> CellRecord:
    """Return the record of a cell with these results, fields of :class:`~thanos.study.store.CellRecord`."""
    values, asked = public_cell(cell), study.asked(cell)
    return CellRecord(
        key=cell_key(values, asked),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=places.commit,
        thanos_version=__version__,
        versions=_versions(),
        machine={**_machine(device), "sharers": sharers},
        cell=values,
        asked=asked,
        sources=places.sources(study, cell),
        **{"status": "done", "reason": None, **results},
    )


def _pruning(report: PruningReport, calibration: str) -> dict[str, Any]:
    """Return what a record says of pruning, with the calibration under its public name."""
    written = report.to_dict()
    return {
        "recipe": {**written["recipe"], "calibration": calibration},
        "calibration": {**written["calibration"], "source": calibration},
        "effective_sparsity": {
            "targeted": report.totals["sparsity_targeted"],
            "all": report.totals["sparsity_all"],
        },
        **{name: written[name] for name in ("layers", "phases", "seconds", "host_peak_bytes", "device_peak_bytes")},
    }


def _phases(records: dict[str, PhaseRecord]) -> dict[str, dict[str, Any]]:
    return {name: asdict(record) for name, record in records.items()}


def _read_windows(path: Path, source: str) -> Calibration | None:
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        made = file.metadata()
        return Calibration(file.get_tensor("ids"), source, made["rule"], int(made["seed"]), int(made["documents"]))


def _write_windows(path: Path, made: Calibration) -> None:
    """Put windows into the cache; another worker may do the same at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    described = {"rule": made.rule, "seed": str(made.seed), "documents": str(made.documents)}
    save_file({"ids": made.ids.contiguous()}, partial, metadata=described)
    partial.replace(path)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _machine(device: torch.device) -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "memory_bytes": memory,
    }


def throttled(tell: Watcher, seconds: float = 0.2) -> Watcher:
    """Return a watcher that passes on progress, and layers, at most that often; everything else always."""
    last = 0.0

    def pass_on(event: Event) -> None:
        nonlocal last
        now = time.monotonic()
        if event.kind not in ("progress", "layer") or now - last >= seconds:
            last = now
            tell(event)

    return pass_on
