"""Zero-shot accuracy, measured by EleutherAI's lm-evaluation-harness, lm_eval (the extra ``eval``).

Scores are cached, see score_cache.py.
"""

from __future__ import annotations

import difflib
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from thanos._version import __version__
from thanos.errors import DataError, resource_errors
from thanos.evaluation.lm_eval_model import keep_requests, templates_compiled_once, wrap
from thanos.evaluation.score_cache import keys_of, read_score, write_score
from thanos.events import Event
from thanos.model.bos import added_bos, check_bos
from thanos.model.loading import adapter_notes, load_model, parse_dtype
from thanos.model.opening import running_dtype
from thanos.model.source import ModelSource, find_local, resolve_model
from thanos.model.transformers_errors import first_line
from thanos.system.device import choose_device
from thanos.system.documents import Document
from thanos.system.extras import install_command, is_installed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCHEMA = 1

PAPER_TASKS = ("winogrande", "openbookqa", "boolq", "piqa", "hellaswag", "arc_easy", "arc_challenge")
"""The seven tasks of the paper's zero-shot tables, by their names in lm_eval."""

_FEWSHOT_SEED = 1234  # lm_eval's own default; it matters only for tasks that require examples

_METRICS = ("acc", "acc_norm")


@dataclass(frozen=True, kw_only=True, slots=True)
class ZeroShot(Document):
    """The result of :func:`zero_shot`; the attributes are the keys of ``--json``.

    Attributes:
        model: as the user named it.
        tasks: task name → ``acc``, ``acc_stderr``, ``acc_norm``, ``acc_norm_stderr`` (None if the task has no such metric),
            ``samples`` (number of documents scored).
        average: unweighted means over the tasks that have the metric, with the same keys except ``samples``; None if no task
            has it. The standard error is that of independent tasks, √(Σ s²)/n.
        limit: largest number of documents per task; None for all.
        cached: names of the tasks whose score came from the cache.
        seconds: seconds of loading and scoring.
        dtype: dtype in which the model runs.
        device: device on which the model runs.
        versions: versions of thanos, lm_eval, torch and transformers.
        bos: ``window`` if every request began with the tokens that the tokenizer puts before a text (lm_eval's
            ``add_bos_token``); ``text`` if lm_eval left that to the tokenizer. In both cases a request without a context begins
            with these tokens. If the tokenizer has none, such a request begins with BOS, or else with the end-of-text token.
        schema: version of this format.
    """

    model: str
    tasks: dict[str, dict[str, Any]]
    average: dict[str, float | None]
    limit: int | None
    cached: list[str]
    seconds: float
    dtype: str
    device: str
    versions: dict[str, str]
    bos: str = "text"
    schema: int = SCHEMA


def zero_shot(
    model: str | Path,
    *,
    tasks: Sequence[str] = PAPER_TASKS,
    task_folder: str | Path | None = None,
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    bos: str = "auto",
    cache: bool = True,
    on_event: Callable[[Event], None] | None = None,
    trust_remote_code: bool = False,
    network: PreTrainedModel | None = None,
) -> ZeroShot:
    """Measure a model's accuracy on tasks of lm_eval, without examples in the prompt and without a chat template.

    Args:
        model: a hub name, a local folder or a ``.gguf`` file.
        tasks: names of tasks, tags or groups; default the paper's seven.
        task_folder: folder with the user's own task files, which ``tasks`` may name.
        limit: largest number of documents per task, from the first on; None for all.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``.
        bos: ``window``: every request begins with the tokens that the tokenizer puts before a text (lm_eval's
            ``add_bos_token``); a tokenizer that puts none there is refused. ``auto``, ``text``: lm_eval leaves this to the
            tokenizer.
        cache: read earlier scores from :func:`~thanos.evaluation.score_cache.cache_folder`, and write new ones there.
        on_event: function called with events of progress.
        trust_remote_code: let transformers run Python code from the checkpoint.
        network: the model, if it is loaded already. It is scored on its own device and in its own dtype; ``device`` and
            ``dtype`` are ignored, and the cache is neither read nor written.

    Raises:
        DataError: lm_eval is not installed, a task is unknown, its data cannot be loaded, or the tokenizer does not fit ``bos``
            ``window``.
        UserError: the model or the device cannot be used.
    """
    began = time.perf_counter()
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least 1 document a task; got {limit}")
    if dtype != "auto":
        parse_dtype(dtype)
    local = find_local(model, trust_remote_code=trust_remote_code, packed=True)
    check_bos(bos)
    _check_task_words(tasks, task_folder)
    where = choose_device(device) if network is None else network.device
    cache = cache and network is None  # the weights of a loaded model have no hash
    add_bos = bos == "window"
    # Reading lm_eval's tasks takes seconds: longer than reading a local model's config, shorter than a download.
    if local is not None:
        source = _checked_source(model, add_bos, trust_remote_code=trust_remote_code)
        check_tasks(tasks, task_folder)
    else:
        check_tasks(tasks, task_folder)
        source = _checked_source(model, add_bos, trust_remote_code=trust_remote_code)
    emit = on_event or (lambda event: None)
    for line in adapter_notes(source):
        emit(Event(kind="note", phase="tasks", message=line))
    runs_in = running_dtype(source, dtype) if network is None else network.dtype
    dtype = str(runs_in).removeprefix("torch.")  # so "auto" has the same cache key as the dtype it means
    loaded = _load_tasks(tuple(tasks), None if task_folder is None else str(task_folder))
    keys = keys_of(source, loaded, limit, dtype, where, bos=add_bos) if cache else {}
    scores = {name: found for name, key in keys.items() if (found := read_score(key)) is not None}
    missing = [name for name in loaded if name not in scores]
    if missing:
        if network is None:
            with resource_errors(device=where):
                network = load_model(source, dtype=runs_in, device=where)
        scores |= _score(network, source, [loaded[name] for name in missing], limit, where, emit, bos=add_bos)
        for name in missing if cache else []:
            write_score(keys[name], scores[name])
    return ZeroShot(
        model=str(model),
        tasks={name: scores[name] for name in loaded},
        average=average([scores[name] for name in loaded]),
        limit=limit,
        cached=sorted(loaded.keys() - missing),
        seconds=time.perf_counter() - began,
        dtype=dtype,
        device=torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
        versions=_versions(),
        bos="window" if add_bos else "text",
    )


def task_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return the tasks that a user named, each once; ``paper`` and ``default`` stand for :data:`PAPER_TASKS`."""
    expanded = [PAPER_TASKS if name.strip() in ("paper", "default") else (name.strip(),) for name in names]
    return tuple(dict.fromkeys(itertools.chain.from_iterable(expanded)))


def check_tasks(tasks: Sequence[str], task_folder: str | Path | None = None) -> None:
    """Raise DataError if lm_eval is not installed, the folder does not exist, or a task is unknown."""
    _check_task_words(tasks, task_folder)
    known = _register(tasks, None if task_folder is None else str(task_folder)).all_tasks
    for task in tasks:
        if task not in known:
            near = difflib.get_close_matches(task, known, n=5, cutoff=0.5)
            hint = f"similar names: {', '.join(near)}" if near else "no name is similar; see lm_eval ls tasks"
            raise DataError(
                f"task {task!r} is unknown to lm_eval; {hint}. Your own tasks need --task-folder, or task_folder in a study"
            )


def _check_task_words(tasks: Sequence[str], task_folder: str | Path | None) -> None:
    """Check, without reading lm_eval's tasks, that the folder exists, a task is named, and lm_eval is installed."""
    if task_folder is not None and not Path(task_folder).is_dir():
        raise DataError(f"the task folder {task_folder} does not exist; give a folder with lm_eval's YAML files")
    if not all(tasks) or not tasks:
        raise DataError(
            f"--tasks names no task; name one of lm_eval, such as piqa, or paper for {', '.join(PAPER_TASKS)}"
        )
    if not is_installed("lm_eval"):
        raise DataError(f"zero-shot tasks need the package lm_eval: {install_command('eval')}")


def _checked_source(model: str | Path, add_bos: bool, *, trust_remote_code: bool) -> ModelSource:
    """Find a model, and check its config and tokenizer."""
    source = resolve_model(model, trust_remote_code=trust_remote_code, packed=True)
    if not added_bos(source.tokenizer()) and add_bos:
        raise DataError(f"the tokenizer of {source.name} adds no beginning-of-text token; leave out --bos")
    return source


def average(scores: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Return the unweighted mean of each metric over the tasks that have it, with its standard error √(Σ s²)/n."""
    means: dict[str, float | None] = {}
    for metric in _METRICS:
        values = [(score[metric], score[f"{metric}_stderr"]) for score in scores if score[metric] is not None]
        errors = [error for _, error in values]
        means[metric] = sum(value for value, _ in values) / len(values) if values else None
        known = bool(errors) and None not in errors
        means[f"{metric}_stderr"] = math.hypot(*errors) / len(errors) if known else None
    return means


def _versions() -> dict[str, str]:
    import transformers

    return {
        "thanos": __version__,
        "lm_eval": metadata.version("lm_eval"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


# --- lm_eval ----------------------------------------------------------------------------------------------------------


def _register(tasks: Sequence[str], task_folder: str | None) -> Any:
    """Return a task manager for these tasks. If the folder has them all, lm_eval's own tasks are not read."""
    if task_folder is not None:
        own = _manager(task_folder, defaults=False)
        if set(tasks) <= set(own.all_subtasks):  # no tag or group: it may have more tasks elsewhere
            return own
    return _manager(task_folder)


@lru_cache(maxsize=4)
def _manager(task_folder: str | None, *, defaults: bool = True) -> Any:
    """Return a task manager of lm_eval, with its own tasks if ``defaults``. It reads thousands of files, so it is cached."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise DataError(f"zero-shot tasks need the package lm_eval ({error}): {install_command('eval')}") from error
    return TaskManager(include_path=task_folder, include_defaults=defaults)


@lru_cache(maxsize=4)
def _load_tasks(tasks: tuple[str, ...], task_folder: str | None) -> dict[str, Any]:
    """Return name → task with its data, for names of tasks, tags or groups. The result is cached for the next model."""
    try:
        loaded = _register(tasks, task_folder).load(list(tasks))["tasks"]
    except Exception as error:  # datasets raises errors of many types
        raise DataError(
            f"the data of {', '.join(tasks)} cannot be loaded ({first_line(error)}); without a network use local tasks: "
            "--task-folder DIR with lm_eval's YAML files, and their names as --tasks"
        ) from error
    return {name: keep_requests(task) for name, task in loaded.items()}


def _score(
    network: PreTrainedModel,
    source: ModelSource,
    tasks: list[Any],
    limit: int | None,
    where: torch.device,
    emit: Callable[[Event], None],
    *,
    bos: bool,
) -> dict[str, dict[str, Any]]:
    """Return the scores of tasks as in :attr:`ZeroShot.tasks`."""
    import lm_eval

    # lm_eval.simple_evaluate does the same, but also spends seconds on a description of the machine.
    for task in tasks:
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    model = wrap(network, source.tokenizer(), emit, bos=bos)
    chosen = {"tasks": {task.config.task: task for task in tasks}, "groups": {}}
    with resource_errors(device=where), templates_compiled_once():
        output = lm_eval.evaluate(model, chosen, limit=limit, log_samples=False)  # type: ignore[arg-type]
    assert output is not None
    results: Any = output.get("results")
    counts: Any = output.get("n-samples")
    scores = {}
    for task in tasks:
        name = task.config.task
        scores[name] = {}
        for metric in _METRICS:
            for suffix in ("", "_stderr"):
                value = results[name].get(f"{metric}{suffix},none")
                scores[name][f"{metric}{suffix}"] = value if isinstance(value, float) else None
        scores[name]["samples"] = counts[name]["effective"]
    return scores
