"""The entry point of a pruning run: from a model's name to a finished output folder."""

from __future__ import annotations

import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from thanos.calibration.making import calibrate
from thanos.calibration.text_files import text_paths
from thanos.calibration.windows import Calibration, check_is_calibration
from thanos.checkpoint.writer import CheckpointWriter
from thanos.engine.activations import check_tier
from thanos.engine.distributed import World
from thanos.engine.joining import join, my_device
from thanos.engine.rank_zero import SharedJournal, SharedWriter
from thanos.errors import NumericsError, RecipeError, resource_errors
from thanos.events import LOG_NAME, Event, Watcher
from thanos.model.layers import find_blocks
from thanos.model.source import find_local, resolve_model
from thanos.recipe import Recipe
from thanos.run.allocation import choose_sparsities
from thanos.run.auxiliary_files import copy_auxiliary_files
from thanos.run.cutting import finish_cut, smaller_writer
from thanos.run.documents import write_documents
from thanos.run.engine_setup import build_engine
from thanos.run.lock import locked
from thanos.run.report import PruningReport
from thanos.run.resume import RunJournal, check_completed, check_same_run, describe_run, describe_text
from thanos.run.setup import (
    Prepared,
    bytes_besides,
    check_calibration,
    check_text_settings,
    checked_recipe,
    prepare,
    shared_facts,
    smaller_calibration,
)
from thanos.run.survey import name_damage
from thanos.run.work_folder import WorkFolder, check_interrupted, check_output, kept
from thanos.system.device import choose_device
from thanos.system.event_stream import EventStream
from thanos.system.meter import PhaseMeter
from thanos.system.ranks import is_main_process
from thanos.system.user_paths import model_name, output_path, without_folders


@dataclass(frozen=True, slots=True)
class _Job:
    """The arguments of a run, and the objects that exist for its whole duration."""

    recipe: Recipe
    device: torch.device
    activations: str
    resume: bool
    overwrite: bool
    work: WorkFolder
    meter: PhaseMeter
    emit: EventStream
    world: World

    @property
    def shared(self) -> dict[str, Any]:
        """The arguments that the pass of the allocation and the engine of the run have in common."""
        return {"device": self.device, "activations": self.activations, "meter": self.meter, "world": self.world}


def prune(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    activations: str = "auto",
    on_event: Watcher | None = None,
    calibration: Calibration | None = None,
) -> PruningReport:
    """Prune a pretrained causal language model and write it as a plain Hugging Face checkpoint.

    If a run ends early, a hidden folder next to ``out`` keeps the finished blocks, and ``resume`` continues from them. After a
    NumericsError nothing is kept, because a resumed run would fail in the same way.

    Args:
        model: a hub name, a local Hugging Face folder, or a ``.gguf`` file.
        out: the output folder. It appears only when it is complete.
        recipe: method, settings and calibration; default :class:`Recipe`, Thanos at 50 % unstructured.
        overwrite: replace ``out`` if it exists; without ``resume``, also discard an interrupted run and start over.
        resume: continue an interrupted run of the same model and recipe; the result is identical to the byte. If there is no
            such run, start from the beginning. If the same run has completed ``out``, return its report and write nothing.
        activations: storage tier of the hidden states between blocks: ``device``, ``host`` or ``disk``; ``auto`` takes the
            first of them that has room. It does not change the result.
        on_event: function that is called with each :class:`~thanos.events.Event`.
        calibration: windows from :func:`~thanos.calibration.windows.build_calibration`, with the recipe's settings and this
            model's tokenizer; default: built now.

    Returns:
        The report, equal to ``pruning.json`` in ``out``.

    Raises:
        UserError: the arguments cannot be used, or another run writes ``out``; nothing was written.
        ResourceError: memory or disk is exhausted.
    """
    recipe, model, out = checked_recipe(recipe), model_name(model), output_path(out)
    check_tier(activations)
    check_is_calibration(calibration)
    work = WorkFolder(out)
    local = Path(model) if find_local(model, trust_remote_code=recipe.trust_remote_code) else None
    complete = resume and not overwrite and work.is_complete

    def check() -> None:
        check_output(out, model=local, overwrite=overwrite or (resume and work.published))

    if is_main_process() and not complete:  # cheap checks first: before the device, and the device before the model
        check()
        check_interrupted(work, resume=resume, overwrite=overwrite)
    device = my_device(choose_device(recipe.device))
    meter = PhaseMeter(device)
    emit = EventStream(on_event, meter, keep_log=True)
    with resource_errors(smaller_calibration(recipe)), join(device) as world:
        if (sequences := recipe.samples + recipe.generate) < world.size:
            raise RecipeError(f"{world.size} processes cannot share {sequences} calibration sequences; raise --samples")
        job = _Job(recipe, device, activations, resume, overwrite, work, meter, emit, world)
        if world.rank > 0:
            return _assist(model, job)
        if complete:
            return _completed(model, job, calibration)
        # The work folder is created only after all other checks have passed.
        with locked(out):
            work.tidy(resume=resume)
            check()
            _check_interrupted_run(job)
            return _prune(model, job, calibration)


def _completed(model: str, job: _Job, given: Calibration | None) -> PruningReport:
    """Return the report of an output that the same run has completed. A scheduler that repeats a job then gets no error."""
    source = resolve_model(model, trust_remote_code=job.recipe.trust_remote_code)
    check_completed(job.work, job.recipe, describe_run(job.recipe, source, job.device), given)
    report = PruningReport.read(job.work.out / "pruning.json")
    message = f"OUT {job.work.out} is already complete, made by the same run: nothing to do"
    job.emit(Event(kind="note", phase="load", message=message))
    return job.world.from_first(lambda: report)


def _assist(model: str, job: _Job) -> PruningReport:
    """Run the part of a process with rank > 0: all blocks and layers, on its own sequences and rows. Only rank 0 writes."""
    world, recipe = job.world, job.recipe
    published: PruningReport | None = world.from_first(_nothing)
    if published is not None:
        return published
    with job.meter.phase("load"):
        source = resolve_model(model, trust_remote_code=recipe.trust_remote_code)
        plan = prepare(source, recipe, lambda event: None, look=False)
        world.check_equal(shared_facts(recipe, plan.opened))
    calibration: Calibration | None = None
    while calibration is None:
        calibration = world.from_first(_nothing)
    parent = job.work.out.parent
    folder = parent if parent.is_dir() else Path(tempfile.gettempdir())
    plan, _ = choose_sparsities(
        plan, recipe, calibration, folder=folder, emit=lambda event: None, store=None, **job.shared
    )
    output = {"writer": SharedWriter(None, world), "journal": SharedJournal(None, world)}
    engine = build_engine(plan, recipe, calibration.ids, folder=folder, **output, **job.shared)
    for _ in engine.run():
        pass
    return world.from_first(_nothing)


def _nothing() -> Any:
    raise AssertionError("only rank 0 computes shared objects")


def _shared_progress(job: _Job) -> Watcher:
    """Return the watcher of the calibration. At each progress event all processes synchronise.

    So none waits longer than the timeout of torch.distributed for text that rank 0 generates.
    """

    def watch(event: Event) -> None:
        job.emit(event)
        if event.kind == "progress":
            job.world.from_first(lambda: None)

    return watch


def _check_interrupted_run(job: _Job) -> None:
    work = job.work
    check_interrupted(work, resume=job.resume, overwrite=job.overwrite)
    if job.resume and not work.finished and not work.published:
        job.emit(Event(kind="note", phase="load", message="there is nothing to resume: starting from the beginning"))


def _prune(model: str, job: _Job, given: Calibration | None) -> PruningReport:
    recipe, work, emit = job.recipe, job.work, job.emit
    before = work.run if job.resume else {}
    done = bool(before) and work.published
    if not done:
        check_calibration(recipe, given)
    emit(Event(kind="phase", phase="load"))
    with job.meter.phase("load"):
        source = resolve_model(model, trust_remote_code=recipe.trust_remote_code)
        run = describe_run(recipe, source, job.device)
        run["machine"]["processes"] = job.world.size
        if before:
            check_same_run(before, run)
        # If the output was complete, only the end of the run was interrupted: there is nothing left to prune.
        published = job.world.from_first(lambda: PruningReport.read(work.out / "pruning.json") if done else None)
        if published is not None:
            work.remove()
            return published
        if given is None:
            check_text_settings(source, recipe)
        check_calibration(recipe, given, source)
        plan = prepare(source, recipe, emit, folder=work.model)
        job.world.check_equal(shared_facts(recipe, plan.opened))
    with job.meter.phase("calibration"):
        if given is None:
            run["text"] = describe_text(recipe)  # now, since the files may change while the run lasts
        kept_windows = given or (work.windows(recipe) if before else None)
        calibration = calibrate(plan.opened, recipe, job.device, _shared_progress(job), kept_windows)
        job.world.from_first(lambda: calibration)
    run |= {"calibration": calibration.to_dict(), "blocks": len(find_blocks(plan.opened.meta_model)[1])}
    notes = check_same_run(before, run) if before else []
    with kept(work), resource_errors(smaller_calibration(recipe)):
        if not before:
            work.start(run, calibration)
        with closing(emit):
            local = [str(work.out), *([source.name] if source.is_local else [])]
            local += [path for text in (recipe.calibration, recipe.prompts or "") for path in text_paths(text)]
            emit.log_to(work.model / LOG_NAME, lambda line: without_folders(line, local))
            for note in notes:
                emit(Event(kind="note", phase="load", message=note))
            report = _run(plan, job, calibration, notes)
        work.publish(overwrite=job.overwrite)
    return job.world.from_first(lambda: report)


def _run(plan: Prepared, job: _Job, calibration: Calibration, notes: list[str]) -> PruningReport:
    """Prune the model and write the complete checkpoint to the work folder."""
    opened, folder, recipe, meter, hidden = plan.opened, job.work.model, job.recipe, job.meter, job.work.path
    plan, allocation = choose_sparsities(
        plan, recipe, calibration, folder=hidden, emit=job.emit, store=hidden / "allocation.json", **job.shared
    )
    cutting, besides = plan.cutting, bytes_besides(plan.layers)
    smaller = None if cutting is None else smaller_writer(cutting, opened, folder, besides, job.emit)
    writer = smaller or CheckpointWriter(opened.checkpoint.layout, opened.checkpoint, folder, besides=besides)
    job.work.take_up(writer.files)
    journal = RunJournal(job.work.journal, writer, meter)
    if job.work.finished:
        journal.verify(job.emit)
    output = {"writer": SharedWriter(writer, job.world), "journal": SharedJournal(journal, job.world)}
    notes = [*plan.opened.notes, *notes]
    engine = build_engine(plan, recipe, calibration.ids, folder=hidden, notes=notes, **output, **job.shared)
    block = None
    try:
        for event in engine.run():
            job.emit(event)
            block = event.block
    except NumericsError:
        # A NaN in a weight is first detected in the inputs of another layer: name the weight instead, if there is one.
        name_damage(opened, block)
        raise
    cut = None
    with meter.phase("finish"):
        job.emit(Event(kind="phase", phase="finish", blocks=len(engine.inputs.blocks)))
        writer.finish()
        copy_auxiliary_files(opened, folder)
        if cutting is not None and smaller is not None:
            cut = finish_cut(cutting, smaller.sizes, folder)
    return write_documents(folder, job.work.run, plan, engine, calibration, recipe, allocation=allocation, cut=cut)
