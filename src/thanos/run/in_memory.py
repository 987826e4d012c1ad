"""Pruning of a loaded model in place, for notebooks and programs."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from thanos.calibration.text import text_sha256
from thanos.calibration.windows import (
    Calibration,
)
from thanos.checkpoint.in_memory import LoadedCheckpoint
from thanos.engine.activations import check_tier
from thanos.engine.distributed import SINGLE
from thanos.engine.records import BlockRecord
from thanos.errors import ModelError, NumericsError, RecipeError, resource_errors
from thanos.events import Event, Watcher
from thanos.model.loading import check_token_ids, parse_dtype
from thanos.model.meta_model import build_meta_model, persistent_tensors
from thanos.model.names import split_fused
from thanos.model.opening import OpenedModel
from thanos.model.source import ModelSource
from thanos.recipe import Recipe
from thanos.run.allocation import choose_sparsities
from thanos.run.documents import make_report, public_recipe
from thanos.run.engine_setup import build_engine
from thanos.run.given_windows import given_windows
from thanos.run.report import PruningReport
from thanos.run.setup import Prepared, checked_recipe, prepare_opened, smaller_calibration
from thanos.run.survey import name_damage
from thanos.system.device import choose_device
from thanos.system.event_stream import EventStream
from thanos.system.meter import PhaseMeter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def prune_model(
    model: PreTrainedModel,
    calibration: str | Sequence[str] | Sequence[Tensor] | Tensor | None = None,
    recipe: Recipe | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    activations: str = "auto",
    on_event: Watcher | None = None,
) -> PruningReport:
    """Prune a loaded causal language model in place. Nothing is written to the disk.

    The weights are those that :func:`thanos.prune` gives for a folder of the same model, with the same recipe and calibration.
    Each block's weights change when the block is done: if the run fails later, the finished blocks stay pruned.

    Args:
        model: a model as transformers loads it, not quantised, on any device, in any mode. Its parameters stay the same
            objects.
        calibration: token ids, as a tensor (samples, T) or a list of tensors (T,) of one length, int64; or a list of texts, or
            a source of text as in ``recipe.calibration``, both of which need ``tokenizer``. Default: the recipe's source.
        recipe: method and settings; default :class:`Recipe`. Token ids determine ``samples`` and ``sequence_length``.
            If ``device`` or ``dtype`` is ``auto``, the model's own is used. ``output_dtype`` must be ``auto``.
        tokenizer: the model's tokenizer, for texts.
        activations: storage tier of the hidden states between blocks; see :func:`thanos.prune`.
        on_event: function that is called with each :class:`~thanos.events.Event`.

    Returns:
        The report, as ``pruning.json`` has it for a folder.

    Raises:
        UserError: an argument cannot be used; the model is unchanged.
        NumericsError: weights or activations hold NaN or infinity.
        ResourceError: memory is exhausted.
    """
    recipe = checked_recipe(recipe)
    if recipe.parsed_pattern.unit_kinds:
        raise RecipeError(
            f"pattern {recipe.pattern} makes a model smaller, which cannot be done in place; write a folder with thanos.prune"
        )
    check_tier(activations)
    if recipe.output_dtype != "auto":
        raise RecipeError(
            f"output_dtype {recipe.output_dtype} is for a folder that is written; convert the model itself: model.to(dtype)"
        )
    source = recipe.calibration if calibration is None else calibration
    if isinstance(source, str):
        recipe = recipe.replace(calibration=source)  # refused now, before text is made, if they contradict each other
    device = _device(model, recipe)
    meter = PhaseMeter(device)
    emit = EventStream(on_event, meter, keep_log=False)
    with resource_errors(smaller_calibration(recipe)), tempfile.TemporaryDirectory() as folder:
        emit(Event(kind="phase", phase="load"))
        with meter.phase("load"):
            checkpoint, opened = _open(model, recipe)
            try:
                windows, recipe = given_windows(model, source, recipe, tokenizer, emit)
            except NumericsError:  # of the text that the model generates
                name_damage(opened, None)
                raise
            check_token_ids(windows.ids, opened.meta_model)
            plan = prepare_opened(opened, recipe, emit)
        text_hash = text_sha256(source) if isinstance(source, str) else None
        shared = {"device": device, "activations": activations, "meter": meter, "world": SINGLE}
        return _run(plan, _InPlace(checkpoint), windows, recipe, text_hash, Path(folder), emit, shared)


def _run(
    plan: Prepared,
    output: Any,
    calibration: Calibration,
    recipe: Recipe,
    text_hash: str | None,
    folder: Path,
    emit: EventStream,
    shared: dict[str, Any],
) -> PruningReport:
    """Run the engine on the prepared model; return the report.

    ``output`` is the writer and the journal. ``shared`` are the arguments that the pass of the allocation and the engine have
    in common.
    """
    plan, allocation = choose_sparsities(plan, recipe, calibration, folder=folder, emit=emit, store=None, **shared)
    notes = plan.opened.notes
    engine = build_engine(
        plan, recipe, calibration.ids, folder=folder, writer=output, journal=output, notes=notes, **shared
    )
    block = None
    try:
        for event in engine.run():
            emit(event)
            block = event.block
    except NumericsError:
        name_damage(plan.opened, block)
        raise
    report = make_report(plan, engine, calibration, public_recipe(recipe), text_hash)
    if allocation is not None:
        report.execution["allocation"] = dict(allocation)
    return report


class _InPlace:
    """Takes the tensors of a block, and copies them into the model when the block is finished.

    It replaces the writer and the journal of a run. A stage may read the dense weights of its block until then.
    """

    def __init__(self, checkpoint: LoadedCheckpoint) -> None:
        self._checkpoint = checkpoint
        self._pending: dict[str, Tensor] = {}
        self.finished: dict[int | None, BlockRecord] = {}

    def write(self, name: str, tensor: Tensor) -> None:
        """Keep a copy of a tensor: its memory may be used again."""
        self._pending[name] = tensor.detach().clone()

    def removes(self, layer: str, units: Sequence[int]) -> None:
        """The model keeps its size: removed units are zeros."""

    def read(self, name: str) -> Tensor:
        """Return a tensor that was written."""
        return self._pending[name] if name in self._pending else self._checkpoint.read(name)

    def record(self, record: BlockRecord, written: Sequence[str]) -> None:
        """Copy the block's tensors into the model."""
        del record, written
        for name, tensor in self._pending.items():
            self._checkpoint.assign(name, tensor)
        self._pending.clear()


def _device(model: PreTrainedModel, recipe: Recipe) -> torch.device:
    """Return the device on which blocks run: the recipe's, or the model's own.

    Raises ModelError if the argument is no model of transformers, or is not loaded.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"prune_model takes a model of transformers, such as AutoModelForCausalLM.from_pretrained(...); got "
            f"{type(model).__name__}; thanos.prune takes names and folders"
        )
    devices = {parameter.device for parameter in model.parameters()}
    if torch.device("meta") in devices:
        raise ModelError(
            "some of the model's parameters are on the meta device: load the whole model, without offloading"
        )
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ModelError(
            "the model was made under torch.inference_mode, so its weights cannot be changed: load it outside of that"
        )
    return choose_device(recipe.device) if recipe.device != "auto" else model.device


def _open(model: Any, recipe: Recipe) -> tuple[LoadedCheckpoint, OpenedModel]:
    """Return the model's tensors, which share its memory, and a meta model of the same config that has them.

    Raises ModelError if the model does not match its config, for example because it is quantised or wrapped.
    """
    name = str(getattr(model.config, "name_or_path", "") or type(model).__name__)
    local = Path(name).is_dir()
    source = ModelSource(name, Path(name) if local else Path(os.devnull), None, recipe.trust_remote_code)
    dtype = model.dtype if recipe.dtype == "auto" else parse_dtype(recipe.dtype)
    config = copy.deepcopy(model.config)
    meta_model = build_meta_model(config, dtype, trust_remote_code=recipe.trust_remote_code, name=name)
    if type(meta_model) is not type(model):
        raise ModelError(
            f"prune_model takes a causal language model as transformers loads it, {type(meta_model).__name__} for this config; "
            f"got {type(model).__name__}"
        )
    tensors = persistent_tensors(model)
    for key, tensor in tensors.items():
        if isinstance(tensor, torch.nn.Parameter) and not (tensor.is_floating_point() and tensor.dtype.itemsize > 1):
            raise ModelError(f"{key} is {str(tensor.dtype).removeprefix('torch.')}: give the model before quantisation")
        if not tensor.is_contiguous():
            raise ModelError(f"{key} is not contiguous; make it so first: parameter.data = parameter.data.contiguous()")
    checkpoint = LoadedCheckpoint(tensors)
    split_fused(meta_model, checkpoint, {key: key for key in checkpoint.tensors})
    expected = persistent_tensors(meta_model)
    for key, tensor in expected.items():
        if key not in checkpoint.tensors or checkpoint.tensors[key].shape != tuple(tensor.shape):
            raise ModelError(f"the model has no {key} of shape {list(tensor.shape)}, although its config requires it")
    return checkpoint, OpenedModel(source, meta_model, checkpoint, {key: key for key in expected}, [])
