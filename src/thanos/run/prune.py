"""The entry point of a pruning run: from a model's name to a finished output folder."""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from thanos._version import __version__
from thanos.calibration.windows import Calibration, calibrate
from thanos.checkpoint.writer import CheckpointWriter
from thanos.engine.activations import check_place
from thanos.engine.distributed import World, join, my_device, speaks
from thanos.engine.loop import Engine
from thanos.engine.rank_zero import SharedJournal, SharedWriter
from thanos.errors import NumericsError, RecipeError, ResourceError, recurs, resource_errors
from thanos.events import LOG_NAME, RUN_NAME, Event, Watcher
from thanos.model.layers import find_blocks
from thanos.model.opening import OpenedModel
from thanos.model.source import find_local, resolve_model
from thanos.recipe import Recipe
from thanos.run import model_card as card
from thanos.run.auxiliary_files import copy_auxiliary_files
from thanos.run.lock import locked
from thanos.run.report import PruningReport, compute_totals
from thanos.run.resume import RunJournal, check_completed, check_same_run, completed_run, describe_run
from thanos.run.setup import (
    LOG_BYTES_PER_LAYER,
    Prepared,
    build_engine,
    check_calibration,
    check_text_settings,
    checked_recipe,
    prepare,
    smaller_calibration,
)
from thanos.run.survey import name_damage
from thanos.run.work_folder import WorkFolder, check_interrupted, check_output
from thanos.system.device import choose_device
from thanos.system.event_stream import EventStream
from thanos.system.meter import PhaseMeter
from thanos.system.user_paths import model_name, output_path


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
    tell: EventStream
    world: World


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
    check_place(activations)
    work = WorkFolder(out)
    local = Path(model) if find_local(model, trust_remote_code=recipe.trust_remote_code) else None
    complete = resume and not overwrite and work.is_complete

    def check() -> None:
        check_output(out, model=local, overwrite=overwrite or (resume and work.published))

    if speaks() and not complete:  # cheap checks first: before the device, and the device before the model
        check()
        check_interrupted(work, resume=resume, overwrite=overwrite)
    device = my_device(choose_device(recipe.device))
    meter = PhaseMeter(device)
    tell = EventStream(on_event, meter, keep_log=True)
    with resource_errors(smaller_calibration(recipe)), join(device) as world:
        if recipe.samples < world.size:
            raise RecipeError(
                f"{world.size} processes cannot share {recipe.samples} calibration sequences; raise --samples"
            )
        job = _Job(recipe, device, activations, resume, overwrite, work, meter, tell, world)
        if world.rank > 0:
            return _assist(model, job)
        if complete:
            return _completed(model, job, calibration)
        # The work folder is created only after all other checks have passed.
        with locked(out):
            work.tidy(resume=resume)
            check()
            _choose(job)
            return _prune(model, job, calibration)


def _completed(model: str, job: _Job, given: Calibration | None) -> PruningReport:
    """Return the report of an output that the same run has completed. A scheduler that repeats a job then gets no error."""
    source = resolve_model(model, trust_remote_code=job.recipe.trust_remote_code)
    check_completed(job.work, job.recipe, describe_run(job.recipe, source, job.device), given)
    report = PruningReport.read(job.work.out / "pruning.json")
    message = f"OUT {job.work.out} is already complete, made by this same run: nothing is done"
    job.tell(Event(kind="note", phase="load", message=message))
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
        world.check_equal(_facts(recipe, plan.opened))
    calibration: Calibration = world.from_first(_nothing)
    parent = job.work.out.parent
    folder = parent if parent.is_dir() else Path(tempfile.gettempdir())
    engine = _engine(plan, job, calibration, folder, SharedWriter(None, world), SharedJournal(None, world), [])
    for _ in engine.run():
        pass
    return world.from_first(_nothing)


def _nothing() -> Any:
    raise AssertionError("only rank 0 makes what it shares")


def _facts(recipe: Recipe, opened: OpenedModel) -> dict[str, Any]:
    """Return the facts that must be equal in all processes of a run, by name."""
    import transformers

    tensors = sorted((name, str(info.dtype), info.shape) for name, info in opened.checkpoint.tensors.items())
    config = {key: value for key, value in opened.meta_model.config.to_dict().items() if key != "_name_or_path"}
    return {
        **{f"the recipe's {name}": value for name, value in recipe.to_dict().items()},
        "the model's config": hashlib.sha256(repr(sorted(config.items())).encode()).hexdigest(),
        "the list of the model's tensors": hashlib.sha256(repr(tensors).encode()).hexdigest(),
        "thanos": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _choose(job: _Job) -> None:
    work = job.work
    check_interrupted(work, resume=job.resume, overwrite=job.overwrite)
    if job.resume and not work.finished and not work.published:
        job.tell(Event(kind="note", phase="load", message="there is nothing to resume: starting from the beginning"))


def _prune(model: str, job: _Job, given: Calibration | None) -> PruningReport:
    recipe, work, tell = job.recipe, job.work, job.tell
    before = work.run if job.resume else {}
    if not (before and work.published):
        check_calibration(recipe, given)
    tell(Event(kind="phase", phase="load"))
    with job.meter.phase("load"):
        source = resolve_model(model, trust_remote_code=recipe.trust_remote_code)
        run = describe_run(recipe, source, job.device)
        run["machine"]["processes"] = job.world.size
        if before:
            check_same_run(before, run)
        # If the output was published, only the cleanup after it was interrupted: there is nothing left to prune.
        published = PruningReport.read(work.out / "pruning.json") if before and work.published else None
        job.world.from_first(lambda: published)
        if published is not None:
            work.remove()
            return published
        if given is None:
            check_text_settings(source, recipe)
        check_calibration(recipe, given, source)
        plan = prepare(source, recipe, tell, folder=work.model)
        job.world.check_equal(_facts(recipe, plan.opened))
    with job.meter.phase("calibration"):
        calibration = calibrate(plan.opened, recipe, job.device, tell, given)
        job.world.from_first(lambda: calibration)
    run |= {"calibration": calibration.to_dict(), "blocks": len(find_blocks(plan.opened.meta_model)[1])}
    notes = check_same_run(before, run) if before else []
    with _kept(work), resource_errors(smaller_calibration(recipe)):
        if before:
            work.take_up({shard.name for shard in plan.opened.checkpoint.layout.shards})
        else:
            work.start(run)
        with closing(tell):
            tell.log_to(work.model / LOG_NAME)
            for note in notes:
                tell(Event(kind="note", phase="load", message=note))
            report = _run(plan, job, calibration, notes)
        work.publish(overwrite=job.overwrite)
    return job.world.from_first(lambda: report)


@contextmanager
def _kept(work: WorkFolder) -> Iterator[None]:
    """Keep the work folder of a run that ends early, if the run can be resumed; else remove it."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, FileNotFoundError) and not work.path.exists():
            raise ResourceError(f"{work.path} was deleted during the run, and with it what was finished") from error
        # A resumed run would fail with the same NaN again.
        if isinstance(error, NumericsError) or not work.finished:
            with suppress(OSError):
                work.remove()
        elif not recurs(error):
            error.add_note(
                f"{work.finished} of {work.run['blocks']} blocks are finished; resume=True goes on with them"
            )
        raise


def _run(plan: Prepared, job: _Job, calibration: Calibration, notes: list[str]) -> PruningReport:
    """Prune the model and write the complete checkpoint to the work folder."""
    opened, folder, world, meter = plan.opened, job.work.model, job.world, job.meter
    writer = CheckpointWriter(
        opened.checkpoint.layout, opened.checkpoint, folder, besides=LOG_BYTES_PER_LAYER * len(plan.layers)
    )
    journal = RunJournal(job.work.journal, writer, meter)
    if job.work.finished:
        journal.verify(job.tell)
    shared = SharedWriter(writer, world), SharedJournal(journal, world)
    engine = _engine(plan, job, calibration, job.work.path, *shared, notes)
    block = None
    try:
        for event in engine.run():
            job.tell(event)
            block = event.block
    except NumericsError:
        # A NaN in a weight is first detected in the inputs of another layer: name the weight instead, if there is one.
        name_damage(opened, block)
        raise
    with meter.phase("finish"):
        job.tell(Event(kind="phase", phase="finish", blocks=len(engine.inputs.blocks)))
        writer.finish()
        copy_auxiliary_files(opened, folder)
    report = _report(plan, engine, calibration, job.recipe, job.device, meter)
    report.write(folder / "pruning.json")
    (folder / "recipe.toml").write_text(job.recipe.to_toml(), encoding="utf-8")
    (folder / "README.md").write_text(card.model_card(report), encoding="utf-8")
    run = completed_run(job.work.run, job.recipe, folder)
    (folder / RUN_NAME).write_text(json.dumps(run, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def _engine(
    plan: Prepared,
    job: _Job,
    calibration: Calibration,
    folder: Path,
    writer: SharedWriter,
    journal: SharedJournal,
    notes: list[str],
) -> Engine:
    """Return the engine of this process, which runs blocks on the process's own range of sequences."""
    share = job.world.share(len(calibration.ids))
    return build_engine(
        plan,
        job.recipe,
        calibration.ids[share.start : share.stop],
        job.device,
        folder,
        activations=job.activations,
        writer=writer,
        journal=journal,
        meter=job.meter,
        world=job.world,
        notes=[*plan.opened.notes, *notes],
    )


def _report(
    plan: Prepared,
    engine: Engine,
    calibration: Calibration,
    recipe: Recipe,
    device: torch.device,
    meter: PhaseMeter,
) -> PruningReport:
    import safetensors
    import transformers

    opened = plan.opened
    parameters = sum(info.numel for info in opened.checkpoint.tensors.values())
    phases = meter.records()
    return PruningReport(
        thanos_version=__version__,
        model={
            "name": card.public_name(opened.source.name) if opened.source.is_local else opened.source.name,
            "origin": "local" if opened.source.is_local else "hub",
            "architecture": type(opened.meta_model).__name__,
            "parameters": parameters,
            "sparsity": plan.sparsity,
        },
        recipe=recipe.to_dict(),
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
            "platform": platform.platform(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        },
        calibration=calibration.to_dict(),
        layers=engine.records,
        dense=plan.dense,
        totals=compute_totals(engine.records, parameters=parameters, zeros_elsewhere=plan.zeros_elsewhere),
        phases=phases,
        seconds=sum(record.seconds for record in phases.values()),
        host_peak_bytes=max((record.host_peak_bytes or 0 for record in phases.values()), default=0),
        device_peak_bytes=max((record.device_peak_bytes or 0 for record in phases.values()), default=0) or None,
        warnings=engine.notes,
        execution={"activations": engine.place, "batch": engine.inputs.runner.batch},
    )
