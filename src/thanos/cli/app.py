"""The table of commands. Each command is a plain function that calls the library with its options and prints a table."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from thanos._version import __version__
from thanos.cli import (
    bench_decode,
    bench_layer,
    bench_model,
    compare,
    evaluate,
    inspect,
    pack,
    prune,
    recover,
    report,
    study,
)
from thanos.cli.arguments import Command, Group

app = typer.Typer(
    name="thanos",
    cls=Group,
    help="Prune pretrained language models, recover their accuracy, and measure the result.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(
    name="bench",
    cls=Group,
    help="Measure how fast this machine prunes and how fast packed models decode, and compare with lower bounds.",
    short_help="Measure how fast this machine prunes and decodes.",
    rich_markup_mode=None,
)
app.add_typer(bench)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"thanos {__version__}")
        raise typer.Exit


for _group, _name, _function, _examples, _help in (
    (app, "prune", prune.prune, prune.EXAMPLES, "Prune MODEL and write it to OUT."),
    (app, "recover", recover.recover, recover.EXAMPLES, "Train OUT towards its dense parent; zeros stay zero."),
    (app, "eval", evaluate.evaluate, evaluate.EXAMPLES, "Measure perplexity, or zero-shot accuracy."),
    (app, "compare", compare.compare, compare.EXAMPLES, "Compare models by size, speed, quality and text."),
    (app, "inspect", inspect.inspect, inspect.EXAMPLES, "Show which weights are zero, and in which pattern."),
    (app, "pack", pack.pack, pack.EXAMPLES, "Write a pruned model with fewer bytes."),
    (app, "unpack", pack.unpack, pack.UNPACK_EXAMPLES, "Restore the dense folder of a packed model."),
    (app, "study", study.study, study.EXAMPLES, "Prune and measure a grid of models and settings."),
    (app, "report", report.report, report.EXAMPLES, "Write the report of a study."),
    (bench, "layer", bench_layer.layer, bench_layer.EXAMPLES, "Time the solvers on one layer."),
    (bench, "model", bench_model.model, bench_model.EXAMPLES, "Time the pruning of a model with random weights."),
    (bench, "decode", bench_decode.decode, bench_decode.EXAMPLES, "Time decoding of a packed model."),
):
    _group.command(name=_name, cls=Command, short_help=_help, epilog=_examples)(_function)


def usage_line(error: Any) -> str:
    """Return the argument parser's error message as one line that refers to the command's help."""
    message = str(error.format_message()).strip().rstrip(".")
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "thanos"
    return f"{message}; see {command} --help"
