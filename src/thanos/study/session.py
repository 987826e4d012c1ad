"""Running cells one after another, in one process on one device. Objects that several cells need are kept."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from thanos._version import __version__
from thanos.calibration.kept import read_windows, write_windows
from thanos.calibration.making import make_calibration
from thanos.calibration.windows import Calibration
from thanos.errors import NumericsError, RecipeError, ResourceError, UserError, is_out_of_memory, resource_errors
from thanos.evaluation.inspect import inspect_checkpoint
from thanos.evaluation.perplexity import evaluate, joined_text
from thanos.evaluation.reference import make_reference
from thanos.evaluation.scoring import Reference
from thanos.events import Event, Watcher
from thanos.model.layers import LinearLayer, linear_layers, select_layers
from thanos.model.loading import load_model
from thanos.model.opening import meta_model_of
from thanos.model.source import resolve_model
from thanos.recipe import Recipe
from thanos.run.names import public_name as public
from thanos.run.prune import prune
from thanos.solvers.hessian import InputStatistics
from thanos.solvers.prune_layer import prune_layer
from thanos.solvers.synthetic_layer import synthetic_layer
from thanos.study.grid import DENSE, Cell, Study, public_cell
from thanos.study.paths import Locations
from thanos.study.records import evaluation_fields, make_record, phase_fields, pruning_fields
from thanos.study.store import CellRecord, cell_key
from thanos.system.device import choose_device
from thanos.system.memory import free_device_bytes, free_host_bytes
from thanos.system.meter import PhaseMeter

_KEEP_FRACTION = 0.25
"""Fraction of the free memory for the dense model's kept hidden states. The rest is for two models and their logits."""


class Session:
    """Runs the cells of a study on one device.

    Args:
        study: the study.
        locations: locations of its models and texts.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        sharers: number of workers that share the device's memory, this one included.
    """

    def __init__(self, study: Study, locations: Locations, device: str, *, sharers: int = 1) -> None:
        self._study, self._locations = study, locations
        self._device, self._name = choose_device(device), device
        self._sharers = sharers
        self._reference: tuple[str, Reference] | None = None
        self._calibration: dict[str, Calibration] = {}
        self._warm: set[str] = set()
        self._layers: dict[str, list[LinearLayer]] = {}
        self._warmed_layers: set[object] = set()

    def run(self, cell: Cell, emit: Watcher) -> CellRecord:
        """Run one cell and return its record. An error gives a failed record with the reason and the results so far."""
        results: dict[str, Any] = {}
        try:
            (self._dense if cell.method == DENSE else self._pruned)(cell, results, emit)
        except Exception as error:
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            if isinstance(error, ResourceError) or is_out_of_memory(error):
                self._reference = None  # free its memory for the next cell
            results |= {"status": "failed", "reason": self._locations.without_paths(reason)}
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return make_record(self._study, self._locations, cell, self._device, results, sharers=self._sharers)

    # --- the kinds of cells; each adds its measurements to the results immediately, so a later failure does not lose them -

    def _dense(self, cell: Cell, results: dict[str, Any], emit: Watcher) -> None:
        model = self._locations.models[cell.model]
        totals = inspect_checkpoint(model).totals
        results["effective_sparsity"] = {"targeted": totals["sparsity_targeted"], "all": totals["sparsity_all"]}
        results["phases"] = {}
        self._measure(cell, model, results, emit)

    def _pruned(self, cell: Cell, results: dict[str, Any], emit: Watcher) -> None:
        source = self._locations.texts.get(cell.calibration or "", cell.calibration)
        # The report compares the errors of methods, so every method measures them on all tokens.
        settings = {"calibration": source, "device": self._name, "dtype": self._study.dtype}
        recipe = cell.recipe(**settings, measure_error=True)
        self._warm_up(cell, recipe)
        key = cell_key(public_cell(cell), self._locations.asked(self._study, cell))
        folder = self._locations.out / "models" if self._study.keep_models else self._locations.scratch
        model = folder / key[:16]
        try:
            report = prune(
                self._locations.models[cell.model],
                model,
                recipe,
                overwrite=True,
                on_event=emit,
                calibration=self._windows(cell, recipe, emit),
            )
            results |= pruning_fields(report, public(cell.calibration or ""))
            self._measure(cell, str(model), results, emit)
        finally:
            if not self._study.keep_models:
                shutil.rmtree(model, ignore_errors=True)

    def _measure(self, cell: Cell, model: str, results: dict[str, Any], emit: Watcher) -> None:
        """Evaluate a model, and add the scores and the phases to the results; the phases also after a failure."""
        if self._study.asked(cell)["evaluation"] is None:
            return
        meter = PhaseMeter(self._device)
        try:
            self._score(cell, model, results, meter, emit)
        finally:
            results["phases"] |= phase_fields(meter.records())

    def _score(self, cell: Cell, model: str, results: dict[str, Any], meter: PhaseMeter, emit: Watcher) -> None:
        tasks = self._study.asked(cell)["zero_shot"]
        with meter.phase("reference"):
            reference = self._shared_reference(cell)
        emit(Event(kind="phase", phase="evaluate"))
        network = reference.model if cell.method == DENSE else None
        with meter.phase("evaluate"):
            if network is None:
                with resource_errors(device=self._device):
                    network = load_model(resolve_model(model), dtype=self._study.dtype, device=self._device)
            evaluation = evaluate(model, reference=reference, network=network, on_event=emit)
        if not math.isfinite(evaluation.perplexity):
            raise NumericsError(
                f"the perplexity is infinite: the mean loss is {evaluation.mean_loss:.4g} nats per token"
            )
        results["evaluation"] = evaluation_fields(evaluation)
        if tasks is None:
            return
        from thanos.evaluation.tasks import zero_shot

        with meter.phase("zero_shot"):
            others = {
                "task_folder": self._locations.task_folder,
                "network": network,
                "bos": "window" if reference.bos == "window" else "auto",
            }
            scores = zero_shot(model, **tasks, **others, on_event=emit)
        results["zero_shot"] = {"tasks": scores.to_dict()["tasks"], "average": scores.to_dict()["average"]}

    def _warm_up(self, cell: Cell, recipe: Recipe) -> None:
        """Load libraries and compile kernels before a cell is timed, so that its seconds do not include this.

        Kernels are compiled for shapes, patterns and block sizes. So a synthetic layer of each shape of the model is solved
        with the settings of the recipe, unless an earlier cell has done that.
        """
        if cell.model not in self._warm:
            self._forward_once(cell)
            self._warm.add(cell.model)
        if not compiles(self._device):
            return
        if cell.model not in self._layers:
            source = resolve_model(self._locations.models[cell.model])
            self._layers[cell.model] = linear_layers(meta_model_of(source, source.config(), torch.float32))
        for layer, settings in select_layers(self._layers[cell.model], recipe)[0].items():
            if (layer.shape, settings) in self._warmed_layers:
                continue
            self._warmed_layers.add((layer.shape, settings))
            weight, hessian = synthetic_layer(*layer.shape, tokens=4 * layer.shape[1], device=str(self._device))
            inputs = InputStatistics(hessian, hand_over=True)
            with suppress(RecipeError):  # prune raises it again, with the layer's name
                prune_layer(weight, inputs, settings)
                weight[::8, ::8] = 0.0  # weights with zeros, such as dequantised ones, use other kernels
                prune_layer(weight, inputs, settings)

    def _forward_once(self, cell: Cell) -> None:
        """Run the dense model on one window of the evaluation, or on a sequence of zeros if the model is not evaluated."""
        if cell.model in self._study.cost_only:
            opened = resolve_model(self._locations.models[cell.model])
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
        """Return the evaluation windows and the dense model of a cell. They are kept for the next cells of the model."""
        if self._reference is not None and self._reference[0] == cell.model:
            return self._reference[1]
        self._reference = None
        plan, source = self._study.evaluation, resolve_model(self._locations.models[cell.model])
        text = joined_text(self._locations.texts[plan.text], source.tokenizer(), lambda event: None)
        model = load_model(source, dtype=self._study.dtype, device=self._device)
        bos = plan.bos
        if bos == "window" and cell.model not in self._locations.with_bos:
            bos = "auto"  # the study's setting only affects tokenizers that add the token
        reference = make_reference(
            source,
            model,
            text=text,
            name=public(plan.text),
            sequence_length=plan.sequence_length,
            max_windows=plan.max_windows,
            bos=bos,
            emit=lambda event: None,
        )
        if plan.compare:
            free = free_host_bytes() if self._device.type == "cpu" else free_device_bytes(self._device)
            room = int(_KEEP_FRACTION * free) // self._sharers
            reference = replace(reference, dense=public(cell.model), model=model, keep_bytes=room)
        self._reference = (cell.model, reference)
        return reference

    def _windows(self, cell: Cell, recipe: Recipe, emit: Watcher) -> Calibration:
        """Return the calibration windows of a cell: those kept in this process or in the study's cache, or new ones."""
        # The cache key covers everything that affects the windows, the code included.
        key_values = {
            "model": self._locations.hashes[cell.model],
            "calibration": self._locations.hashes.get(cell.calibration or "") or cell.calibration,
            "shape": [cell.samples, cell.sequence_length, cell.seed],
            "generated_in": self._study.dtype if cell.calibration == "self" else None,
            "version": [__version__, self._locations.commit],
        }
        key = hashlib.sha256(json.dumps(key_values).encode()).hexdigest()
        if key not in self._calibration:
            path = self._locations.out / "cache" / f"calibration-{key[:24]}.safetensors"
            made = read_windows(path, recipe.calibration)
            if made is None:
                made = make_calibration(resolve_model(self._locations.models[cell.model]), recipe, self._device, emit)
                write_windows(path, made)
            self._calibration[key] = made
        return self._calibration[key]


def compiles(device: torch.device) -> bool:
    """Whether kernels of a device are compiled at their first use."""
    return device.type == "cuda"


def throttled(emit: Watcher, seconds: float = 0.2, clock: Callable[[], float] = time.monotonic) -> Watcher:
    """Return a watcher that forwards progress and layer events at most every ``seconds``, and all other events."""
    last: float | None = None  # None and not 0, since a monotonic clock has an arbitrary start

    def forward(event: Event) -> None:
        nonlocal last
        now = clock()
        if event.kind not in ("progress", "layer") or last is None or now - last >= seconds:
            last = now
            emit(event)

    return forward
