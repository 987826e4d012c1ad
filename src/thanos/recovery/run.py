"""The entry point of a recovery: from a pruned model and its dense parent to a finished output folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thanos.calibration.making import make_calibration
from thanos.calibration.prompts import check_prompts, with_prompts
from thanos.calibration.text import check_text_exists
from thanos.calibration.text_files import text_paths
from thanos.calibration.windows import Calibration, check_is_calibration
from thanos.checkpoint.writer import check_room
from thanos.engine.distributed import World
from thanos.engine.joining import join, my_device
from thanos.errors import resource_errors
from thanos.events import LOG_NAME, RUN_NAME, Event, Watcher
from thanos.model.loading import check_token_ids
from thanos.model.source import ModelSource, find_local
from thanos.recovery.compiling import check_compile, check_compiles, compiled_if_wanted
from thanos.recovery.distance import Distillation
from thanos.recovery.generated import generated_text
from thanos.recovery.guard import Guard
from thanos.recovery.output import Trained, make_report, write_model
from thanos.recovery.pair import Pair, load, masks_of, named_damage, open_pair, resolve_pair, trainable
from thanos.recovery.recipe import RecoveryRecipe
from thanos.recovery.report import NAME, NOTHING_BETTER, RecoveryReport, read_pruning_report, write_reports
from thanos.recovery.setup import (
    bytes_besides,
    check_shard,
    check_split,
    check_text,
    checked_recipe,
    describe_models,
    memory_advice,
    require_trainer,
)
from thanos.recovery.states import RecoveryFolder
from thanos.run.lock import locked
from thanos.run.resume import check_completed, check_same_run, completed_run, describe
from thanos.run.work_folder import check_interrupted, check_output, kept
from thanos.system.device import choose_device
from thanos.system.event_stream import EventStream
from thanos.system.meter import PhaseMeter
from thanos.system.ranks import is_main_process
from thanos.system.user_paths import model_name, output_path, without_folders


@dataclass(frozen=True, slots=True)
class _Job:
    """The arguments of a recovery, and the objects that exist for its whole duration."""

    recipe: RecoveryRecipe
    device: torch.device
    resume: bool
    overwrite: bool
    work: RecoveryFolder
    meter: PhaseMeter
    emit: EventStream
    world: World

    @property
    def leads(self) -> bool:
        """Whether this process reads and writes the files of the run."""
        return self.world.rank == 0


def recover(
    model: str | Path,
    out: str | Path,
    *,
    dense: str | Path,
    recipe: RecoveryRecipe | None = None,
    overwrite: bool = False,
    resume: bool = False,
    on_event: Watcher | None = None,
    calibration: Calibration | None = None,
) -> RecoveryReport:
    """Train the surviving weights of a pruned model so that its next-token distributions approach those of the dense model.

    The loss is KL(dense ‖ pruned), averaged over all tokens of the training sequences. By default the weights of the blocks'
    linear layers are trained. In each epoch the segments of the text are joined in a new order, and a few tokens are replaced.
    Weights that are exactly zero stay zero. The weights are float32 during training; on CUDA the matrix products
    run in bfloat16. After every epoch the loss on held-out sequences is measured, with the weights rounded to the data types in
    which they are stored. The state with the smallest loss is written, or the original if no epoch lowered the loss.

    Messages call ``model`` OUT and ``out`` OUT2, as the command does.

    Args:
        model: the pruned model: a local folder or a hub name, pruned by any tool. It has zeros, or fewer blocks, neurons or
            heads than ``dense``.
        out: the output folder. It appears only when it is complete.
        dense: the model that ``model`` was pruned from: a hub name, a local folder or a ``.gguf`` file.
        recipe: the settings; default :class:`RecoveryRecipe`.
        overwrite: replace ``out`` if it exists; without ``resume``, also discard an interrupted run and start over.
        resume: continue an interrupted run; on a CPU the result is identical to the byte. If there is no such run, start from
            the beginning. If the same run has completed ``out``, return its report and write nothing.
        on_event: function that is called with each :class:`~thanos.events.Event`.
        calibration: windows from :func:`~thanos.calibration.windows.build_calibration`; default: built now.

    Returns:
        The report, equal to ``recovery.json`` in ``out``.

    Raises:
        UserError: the arguments cannot be used, or the models do not belong together; nothing was written.
        ResourceError: memory or disk is exhausted.
    """
    recipe, model, out = checked_recipe(recipe), model_name(model, "OUT"), output_path(out, RecoveryFolder.called)
    dense = model_name(dense, "the dense model")
    require_trainer()
    check_is_calibration(calibration)
    work = RecoveryFolder(out)
    trust = recipe.trust_remote_code
    named = {"OUT": model, "the dense model": dense}
    local = [Path(name) for what, name in named.items() if find_local(name, trust_remote_code=trust, what=what)]
    complete = resume and not overwrite and work.is_complete

    def check() -> None:
        for each in local or [None]:
            check_output(out, model=each, overwrite=overwrite or (resume and work.published), name=work.called)

    if is_main_process() and not complete:
        if calibration is None:
            check_text_exists(recipe.calibration)
        check_prompts(recipe, recipe.sequence_length, None)
        check()
        check_interrupted(work, resume=resume, overwrite=overwrite)
    device = my_device(choose_device(recipe.device))
    meter = PhaseMeter(device)
    emit = EventStream(on_event, meter, keep_log=True)
    with resource_errors(*memory_advice(recipe)), join(device) as world, ExitStack() as stack:
        check_split(recipe, world.size)
        check_shard(recipe, device)
        check_compile(recipe)
        job = _Job(recipe, device, resume, overwrite, work, meter, emit if world.rank == 0 else EventStream(), world)
        sources = resolve_pair(model, dense, trust_remote_code=trust)
        now = describe(recipe.to_dict(), describe_models(*sources), device)
        now["machine"]["processes"] = world.size
        if complete:
            if job.leads:
                given = None if calibration is None else with_prompts(calibration, recipe)
                check_completed(work, recipe.text, now, given)
                message = f"{work.called} {out} is already complete, made by the same run: nothing to do"
                emit(Event(kind="note", phase="load", message=message))
            return world.from_first(lambda: _read(work.out))
        if job.leads:
            # The work folder is created only after all other checks have passed.
            stack.enter_context(locked(out, work.called))
            work.tidy(resume=resume)
            check()
            check_interrupted(work, resume=resume, overwrite=overwrite)
            if resume and not (work.finished or work.prepared or work.published):
                emit(
                    Event(kind="note", phase="load", message="there is nothing to resume: starting from the beginning")
                )
        return _recover(*sources, job, now, calibration)


def _read(folder: Path) -> RecoveryReport:
    return RecoveryReport.from_dict(json.loads((folder / NAME).read_bytes()))


def _recover(
    source: ModelSource, parent: ModelSource, job: _Job, now: dict[str, Any], given: Calibration | None
) -> RecoveryReport:
    recipe, work, emit, world = job.recipe, job.work, job.emit, job.world
    before: dict[str, Any] = work.run if job.resume and job.leads else {}
    emit(Event(kind="phase", phase="load"))
    with job.meter.phase("load"):
        if before:
            check_same_run(before, now)
        # If the output was published, only the cleanup afterwards was interrupted, so nothing is left to train.
        published = _read(work.out) if before and work.published else None
        published = world.from_first(lambda: published)
        if published is not None:
            if job.leads:
                work.remove()
            return published
        if job.leads:
            read_pruning_report(source.folder)
            check_text(recipe, parent, given)
        pair = open_pair(source, parent, job.device, emit, compare_weights=job.leads)
        check_compiles(recipe, pair.pruned.meta_model, pair.dense.meta_model)
        if job.leads:
            check_room(pair.pruned.checkpoint.layout, work.model, besides=0 if before else bytes_besides(pair))
    with job.meter.phase("calibration"):
        emit(Event(kind="phase", phase="calibration"))
        calibration = world.from_first(lambda: _calibrate(pair, parent, job, given))
    now |= {"calibration": calibration.to_dict(), "steps": recipe.steps}
    notes = check_same_run(before, now) if before else []
    with ExitStack() as stack:
        if job.leads:
            stack.enter_context(kept(work))
            if before:
                work.take_up(set())
            else:
                work.start(now)
                work.steps.mkdir()
            stack.enter_context(closing(emit))
            local = [str(work.out), *(each.name for each in (source, parent) if each.is_local)]
            local += [path for text in (recipe.calibration, recipe.prompts or "") for path in text_paths(text)]
            emit.log_to(work.model / LOG_NAME, lambda line: without_folders(line, local))
            for note in notes:
                emit(Event(kind="note", phase="load", message=note))
        guard, ended = _train(pair, calibration, job, notes)
        result = Trained(pair, calibration, recipe, guard, ended, notes)
        return world.from_first(lambda: _finish(result, job))


def _finish(result: Trained, job: _Job) -> RecoveryReport:
    """Write the output from the best state, and publish it."""
    work = job.work
    with job.meter.phase("finish"):
        job.emit(Event(kind="phase", phase="finish"))
        zeros = write_model(result, work)
    report = make_report(result, job.device, job.meter, sum(zeros.values()))
    if not report.best_step:
        job.emit(Event(kind="note", phase="finish", message=NOTHING_BETTER))
    write_reports(report, result.pair.pruned.source.folder, work.model, zeros)
    run = completed_run(work.run, job.recipe.text, work.model)
    (work.model / RUN_NAME).write_text(json.dumps(run, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    work.publish(overwrite=job.overwrite)
    return report


def _calibrate(pair: Pair, parent: ModelSource, job: _Job, given: Calibration | None) -> Calibration:
    """Return the windows that the caller gave, after checks, or make them with the tokenizer of both models."""
    if given is not None:
        given.check_made_by(job.recipe.text)
    with named_damage(pair):
        made = given or make_calibration(parent, job.recipe.text, job.device, job.emit)
    for opened in (pair.pruned, pair.dense):
        check_token_ids(made.ids, opened.meta_model)
    return with_prompts(made, job.recipe)


def _train(pair: Pair, calibration: Calibration, job: _Job, notes: list[str]) -> tuple[Guard, str]:
    """Train; return the guard and the reason for an early end, empty if there was none. Remarks are added to ``notes``."""
    from thanos.recovery.trainer import Training, micro_batch

    recipe, work, pruned = job.recipe, job.work, pair.pruned
    with job.meter.phase("load"):
        history = job.world.from_first(lambda: work.history() if job.resume else [])
        newest = job.world.from_first(lambda: work.newest if job.resume else None)
        for opened in (pruned, pair.dense):
            load(opened, job.device)
        parameters = trainable(pruned, recipe.parts(sparse=pair.sparse))
        dtypes = {name: pruned.checkpoint.tensors[pruned.key_of[name]].dtype for name in parameters}
        masks = masks_of(pair, job.device)
    size = micro_batch(recipe, job.device, job.world.size)
    ids, first = calibration.ids, recipe.trained
    if recipe.generate:
        with job.meter.phase("generate"), named_damage(pair):
            generated = generated_text(pair.dense, calibration, recipe, job.emit, work, job.world, resume=job.resume)
        trained, held_out = generated.split([recipe.generate, recipe.generated_held_out])
        ids, first = torch.cat([ids[:first], trained, ids[first:], held_out]), recipe.rows
    guard = Guard(
        ids, first, recipe.generated_held_out, dtypes, size, job.device, job.world, _writer(pair, job), history
    )
    if job.leads:
        work.tidy_states(guard.best["step"] if history else 0)
    module = Distillation(pruned.meta_model, pair.dense.meta_model)
    if newest is not None and history[-1]["step"] >= recipe.steps:
        return guard, ""
    arguments = (recipe, work, job.device, job.world, job.emit, job.meter)
    training = Training(module, masks, ids, calibration.bos_ids, pair.size, guard, *arguments)
    compiler = compiled_if_wanted(recipe, job.device, module, notes, job.emit, job.meter)
    with compiler, job.meter.phase("train"), named_damage(pair):
        ended = training.run(newest)
    if ended:
        job.emit(
            Event(
                kind="note",
                phase="train",
                message=f"{ended}: the training stops, and the best earlier state is written",
            )
        )
    return guard, ended


def _writer(pair: Pair, job: _Job) -> Callable[[int, Iterable[tuple[str, Tensor]]], None] | None:
    """Return the function with which the guard writes a state; None in all processes except rank 0."""
    pruned = pair.pruned

    def write(step: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        named = ((pruned.key_of[name], tensor) for name, tensor in tensors)
        job.work.write_best(step, pruned.checkpoint, named)

    return write if job.leads else None
