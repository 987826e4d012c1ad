"""``make demo``: prune a real model in two ways, and show size, speed and quality of the models in one table.

This is not a command of ``thanos``. Its steps are those of ``thanos prune``, ``pack`` and ``compare`` with small settings, on
text from the help of Python's standard library. Each step first shows its command. A demo that was interrupted continues: it
keeps the dense model and the finished blocks, if they were made from the same model with the same settings.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from thanos.cli import output, tables
from thanos.cli import progress as display

if TYPE_CHECKING:
    from thanos.comparison.document import Row
    from thanos.model.source import ModelSource
    from thanos.recipe import Recipe

_RECIPES = {"pruned": {"pattern": "16:32"}, "shrunk": {"pattern": "neurons", "sparsity": 0.2}}
_SETTINGS = {
    "effort": "high",
    "dense_target": 0.5,  # auto chooses it for 206 of 210 layers, and the choice takes a third of the run
    "calibration": "pydoc",
    "samples": 16,
    "sequence_length": 512,
    "device": "cpu",
}
_EVALUATION = {"text": "pydoc", "sequence_length": 512, "max_windows": 16, "device": "cpu"}

_ORIGIN = "origin.json"
"""File in the dense model's folder: the description of the model from which it was made."""


def demo(model: str, out: Path) -> None:
    """Write ``model`` to ``out`` in bfloat16, packed at 16:32, and without a fifth of its neurons; print a table of all.

    An interrupted demo in ``out`` continues, and finished pruned models are kept, if the model and the settings are the same.
    """
    display.hush()
    import thanos
    from thanos.comparison.report import PAGE, write_report
    from thanos.comparison.run import Request, compare
    from thanos.events import Event
    from thanos.model.source import resolve_model

    def announce(*words: object, flags: Sequence[str] = (), **settings: object) -> str:
        options = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)]
        command = shlex.join(map(str, ("thanos", *words, *options, *flags)))
        watcher(Event(kind="note", phase="load", message=command))
        return command

    dense, pruned, packed, shrunk, page = (out / name for name in ("dense", "pruned", "packed", "shrunk", "comparison"))
    seconds: dict[str, float] = {}
    with display.watch() as watcher:
        if not _write_dense(resolve_model(model), dense):
            watcher(Event(kind="note", phase="load", message=f"{dense} was made from this model earlier: it is kept"))
        for name, recipe in _RECIPES.items():
            settings = recipe | _SETTINGS
            made = thanos.Recipe(**settings)
            how = _how(dense, out / name, made)
            announce("prune", dense, out / name, flags=[f"--{word}" for word, on in how.items() if on], **settings)
            resume, overwrite = how["resume"], how["overwrite"]
            report = thanos.prune(dense, out / name, made, resume=resume, overwrite=overwrite, on_event=watcher)
            output.show_warnings(report, watcher.notes)
            seconds[name] = report.seconds
        announce("pack", pruned, packed)
        began = time.perf_counter()
        thanos.pack(pruned, packed, overwrite=True, on_event=watcher)
        seconds["packed"] = seconds.pop("pruned") + time.perf_counter() - began
        models = [str(folder) for folder in (dense, packed, shrunk)]
        command = announce("compare", *models, out=page, **_EVALUATION)
        found = compare(models, Request(**_EVALUATION), command=command, on_event=watcher)
        write_report([found], page, watcher)
    head = ("", "MB on disk", "MB in memory", "tokens/s", "perplexity", "seconds of work")
    tables.print_table(head, [_line(row, seconds) for row in found.rows], title=f"{Path(model).name} on the CPU")
    for row in found.rows:
        for note in filter(None, (*row.notes, row.reason)):
            print(f"{row.label}: {note}")
    print(f"The texts of the models for three prompts, and the figures: {page / PAGE}")


def _write_dense(source: ModelSource, dense: Path) -> bool:
    """Write a model in bfloat16, unless the folder was written from the same files. Return whether it was written.

    The folder appears only when it is complete. It is not written again, because a pruning run can only be resumed if its
    model's files have not changed.
    """
    from huggingface_hub.repocard import metadata_save

    from thanos.model.loading import load_model
    from thanos.model.stated import stated_facts
    from thanos.run.resume import describe_model

    origin, stored = json.dumps(describe_model(source)), dense / _ORIGIN
    if stored.is_file() and stored.read_text(encoding="utf-8") == origin:
        return False
    partial = dense.with_name(f".{dense.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    load_model(source, dtype="bfloat16").save_pretrained(partial)
    source.tokenizer().save_pretrained(partial)
    if facts := stated_facts(source):  # so the cards of the pruned models have the licence
        metadata_save(partial / "README.md", facts)
    (partial / _ORIGIN).write_text(origin, encoding="utf-8")
    shutil.rmtree(dense, ignore_errors=True)
    partial.rename(dense)
    return True


def _how(dense: Path, out: Path, recipe: Recipe) -> dict[str, bool]:
    """Return ``resume`` and ``overwrite``: the same run in ``out`` is continued or kept, and another one replaced."""
    from thanos.model.source import resolve_model
    from thanos.run.resume import describe_run, find_differences
    from thanos.run.work_folder import WorkFolder
    from thanos.system.device import choose_device

    work = WorkFolder(out)
    now = describe_run(recipe, resolve_model(dense), choose_device(recipe.device))
    same = not find_differences(work.run or work.completed_run, now)
    # The output next to an interrupted run is that of another one, which it was about to replace.
    found = bool(work.run), out.exists()
    return {"resume": same, "overwrite": all(found) or (any(found) and not same)}


def _line(row: Row, seconds: dict[str, float]) -> list[str]:
    disk, memory = (tables.number(value and value / 1e6, 1) for value in (row.disk_bytes, row.weight_bytes))
    perplexity = (row.evaluation or {}).get("perplexity")
    work = f"{seconds[row.label]:.0f}" if row.label in seconds else "-"
    return [row.label, disk, memory, tables.number(row.tokens_per_second, 1), tables.number(perplexity, 2), work]


if __name__ == "__main__":
    from thanos.cli import guard

    sys.exit(guard(lambda: demo(sys.argv[1], Path(sys.argv[2]))))
