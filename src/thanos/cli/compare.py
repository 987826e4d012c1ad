"""``thanos compare``: size, speed, quality and texts of several models, in one table and one page."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thanos.cli.options import (
    MaxWindows,
    Quiet,
    SequenceLength,
    TaskFolder,
    TaskLimit,
    Threads,
    examples,
    given,
    option,
    overwrite_option,
    use_threads,
    with_settings,
)
from thanos.errors import DataError
from thanos.events import Event
from thanos.settings import TEXT_SOURCES, Heading

if TYPE_CHECKING:
    from thanos.comparison.document import Comparison

EXAMPLES = examples(
    ("Compare a model with its pruned and packed versions", "thanos compare MODEL pruned packed"),
    ("Compare quantised versions of two of them too", "thanos compare MODEL pruned --quantised int8,int4,pruned=int8"),
    ("Draw one page from the results of several runs", "thanos compare first/comparison.json second --out both"),
)


@with_settings("device", "dtype", "trust_remote_code")
def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Hub names, folders or .gguf files; the others are compared with the first. Or comparison.json files of "
            "earlier runs, from which one page is drawn.",
            show_default=False,
        ),
    ],
    *,
    out: Annotated[
        Path | None,
        option(
            "Folder for comparison.html, comparison.json, tables and figures",
            Heading.OUTPUT,
            "DIR",
            "--out",
            default="comparison; for a single comparison.json its own folder",
        ),
    ] = None,
    quantised: Annotated[
        str,
        option(
            "Also measure these versions, quantised by torchao: int8 or int4 of the first model, or MODEL=int8 of another; "
            "separated by commas",
            Heading.COMPARISON,
            "KINDS",
            default="none",
        ),
    ] = "",
    prompts: Annotated[
        Path | None,
        option(
            "Text file of prompts that each model continues, separated by blank lines",
            Heading.COMPARISON,
            "FILE",
            default="three prompts",
        ),
    ] = None,
    context: Annotated[int, option("Tokens of the timed prompt", Heading.DECODING, "N")] = 128,
    new_tokens: Annotated[int, option("New tokens to time", Heading.DECODING, "N")] = 64,
    compiled: Annotated[
        bool,
        option(
            "Compile each model with torch.compile before it is timed; torchao's int8 is slow without it",
            Heading.DECODING,
            None,
            "--compile",
            default="off",
        ),
    ] = False,
    text: Annotated[str, option(f"Text: {TEXT_SOURCES}", Heading.PERPLEXITY, "SOURCE")] = "wikitext2",
    sequence_length: SequenceLength = 2048,
    max_windows: MaxWindows = None,
    bos: Annotated[
        str,
        option(
            "Position of the beginning-of-text token: window, text or auto, as for eval", Heading.PERPLEXITY, "POSITION"
        ),
    ] = "auto",
    tasks: Annotated[
        str | None,
        option(
            "Also measure zero-shot accuracy on these lm_eval tasks: names separated by commas, or paper for the seven tasks "
            "of the paper",
            Heading.TASKS,
            "NAMES",
            default="none",
        ),
    ] = None,
    task_folder: TaskFolder = None,
    limit: TaskLimit = None,
    threads: Threads = None,
    overwrite: Annotated[bool, overwrite_option("Replace the measurements of an earlier comparison")] = False,
    quiet: Quiet = False,
    **settings: Any,
) -> None:
    """Measure several models, one after another: bytes, speed, perplexity, distance to the first, accuracy and texts.

    Exits with 1 if a model could not be measured; the reason is in its row.
    """
    from thanos.cli import comparison_output
    from thanos.cli import progress as display

    display.hush()
    from thanos.comparison.document import measured_again
    from thanos.comparison.report import write_document, write_report

    use_threads(threads)
    earlier = _earlier(models)
    if earlier is not None and (quantised or prompts is not None or tasks is not None or compiled):
        raise DataError(
            "--quantised, --prompts, --tasks and --compile measure models, and comparisons of earlier runs are only drawn; "
            "leave them out, or give models"
        )
    out = out or _folder(models, earlier)
    comparison_output.check_writable_folder(out)
    if earlier is None and not overwrite:
        comparison_output.refuse_measurements(out)
    with display.watch(quiet=quiet) as watcher:
        if earlier is not None:
            runs = earlier
            if again := measured_again(runs):
                watcher(Event(kind="note", phase="draw", message=_one_row(again)))
        else:
            from thanos.comparison.prompts import PROMPTS, read_prompts
            from thanos.comparison.run import Request, compare
            from thanos.evaluation.tasks import task_names
            from thanos.system.event_stream import EventStream

            if tasks is None and (task_folder is not None or limit is not None):
                raise DataError("--task-folder and --limit need --tasks; name the tasks")
            request = Request(
                text=text,
                sequence_length=sequence_length,
                max_windows=max_windows,
                bos=bos,
                tasks=() if tasks is None else task_names(tasks.split(",")),
                task_folder=task_folder,
                limit=limit,
                prompts=PROMPTS if prompts is None else read_prompts(prompts),
                context=context,
                new_tokens=new_tokens,
                compiled=compiled,
                **given(settings),
            )
            command = shlex.join(["thanos", *sys.argv[1:]])

            measured, stream = 0, EventStream(watcher)

            def keep(found: Comparison) -> None:
                nonlocal measured
                write_document([found], out)
                measured = len(found.rows)

            try:
                runs = [compare(models, request, quantised=quantised, command=command, on_event=watcher, on_row=keep)]
            except KeyboardInterrupt:
                if measured:
                    stream(Event(kind="note", phase="finish", message=_rest(measured, out)))
                raise
        write_report(runs, out, watcher)
    comparison_output.show_comparison(runs, out)
    if earlier is None and (failed := runs[0].failed):
        typer.echo(
            f"error: {len(failed)} of {len(runs[0].rows)} models were not measured completely; their rows have the reasons",
            err=True,
        )
        raise typer.Exit(1)


def _one_row(labels: list[str]) -> str:
    """Return the note on labels that several runs measured."""
    return (
        f"several of these runs measured {', '.join(labels)}; the page shows the last measurement. If different models have "
        "the same label, rename their folders and measure them again"
    )


def _rest(measured: int, out: Path) -> str:
    """Return how to go on after an interruption that leaves the measurements of the first models."""
    from thanos.comparison.run import APART

    models = "the first model" if measured == 1 else f"the first {measured} models"
    return f"{out} has the measurements of {models}; measure the first model and those that are left {APART}"


def _folder(models: list[str], earlier: list[Comparison] | None) -> Path:
    """Return the folder to write if the user names none: the page of one document is made again in the document's folder.

    Raises DataError if documents are drawn and the default folder has measurements that are in none of them.
    """
    from thanos.comparison.document import NAME

    folder, first = Path("comparison"), Path(models[0])
    if earlier is None:
        return folder
    if len(models) == 1 and (first.is_dir() or first.name == NAME):
        return first if first.is_dir() else first.parent
    if (folder / NAME).is_file() and not _holds_only(folder, earlier):
        raise DataError(
            f"{folder / NAME} has measurements that are in none of these files, and would be replaced; give it too, or give "
            "--out with another folder"
        )
    return folder


def _holds_only(folder: Path, runs: list[Comparison]) -> bool:
    """Return whether every run of the folder's document is among ``runs``; False if the document cannot be read."""
    from thanos.comparison.document import read_comparisons

    try:
        return all(run in runs for run in read_comparisons([folder]))
    except DataError:
        return False


def _earlier(models: list[str]) -> list[Comparison] | None:
    """Return the runs that the arguments name; None if they are models to measure."""
    from thanos.comparison.document import NAME, read_comparisons

    stored = [name.endswith(".json") or (Path(name) / NAME).is_file() for name in models]
    if not any(stored):
        return None
    if not all(stored):
        other = models[stored.index(False)]
        raise DataError(
            f"{other} is a model, but others are comparisons; measure models first, then draw one page of the results"
        )
    return read_comparisons([Path(name) for name in models])
