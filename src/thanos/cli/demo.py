"""``make demo``: prune a real model in two ways, and show size, speed and quality of the models in one table.

This is not a command of ``thanos``. Its steps are those of ``thanos prune``, ``pack`` and ``compare`` with small settings, on
text from the help of Python's standard library. Each step first shows its command.
"""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from thanos.cli import output, tables
from thanos.cli import progress as display

if TYPE_CHECKING:
    from thanos.comparison.document import Row

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


def demo(model: str, out: Path) -> None:
    """Write ``model`` to ``out`` in bfloat16, packed at 16:32, and without a fifth of its neurons; print a table of them."""
    display.hush()
    import thanos
    from thanos.comparison.report import PAGE, write_report
    from thanos.comparison.run import Request, compare
    from thanos.events import Event
    from thanos.model.loading import load_model
    from thanos.model.source import resolve_model

    def announce(*words: object, **settings: object) -> str:
        options = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)]
        command = shlex.join(map(str, ("thanos", *words, *options)))
        watcher(Event(kind="note", phase="load", message=command))
        return command

    dense, pruned, packed, shrunk, page = (out / name for name in ("dense", "pruned", "packed", "shrunk", "comparison"))
    seconds: dict[str, float] = {}
    with display.watch() as watcher:
        source = resolve_model(model)
        load_model(source, dtype="bfloat16").save_pretrained(dense)
        source.tokenizer().save_pretrained(dense)
        for name, recipe in _RECIPES.items():
            settings = recipe | _SETTINGS
            announce("prune", dense, out / name, **settings)
            report = thanos.prune(dense, out / name, thanos.Recipe(**settings), overwrite=True, on_event=watcher)
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


def _line(row: Row, seconds: dict[str, float]) -> list[str]:
    disk, memory = (tables.number(value and value / 1e6, 1) for value in (row.disk_bytes, row.weight_bytes))
    perplexity = (row.evaluation or {}).get("perplexity")
    work = f"{seconds[row.label]:.0f}" if row.label in seconds else "-"
    return [row.label, disk, memory, tables.number(row.tokens_per_second, 1), tables.number(perplexity, 2), work]


if __name__ == "__main__":
    from thanos.cli import guard

    sys.exit(guard(lambda: demo(sys.argv[1], Path(sys.argv[2]))))
