"""The table of commands. Each command is a plain function that calls the library with its options and prints a table."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from thanos._version import __version__
from thanos.cli import compare, evaluate, inspect, pack, prune, recover, report, study
from thanos.cli.arguments import Command, Group
from thanos.cli.bench import bench

app = typer.Typer(
    name="thanos",
    cls=Group,
    help="Prune pretrained language models, recover their accuracy, and measure the result.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"thanos {__version__}")
        raise typer.Exit


for _name, _function, _examples, _help in (
    ("prune", prune.prune, prune.EXAMPLES, "Prune MODEL and write it to OUT."),
    ("recover", recover.recover, recover.EXAMPLES, "Train OUT towards its dense parent; zeros stay zero."),
    ("eval", evaluate.evaluate, evaluate.EXAMPLES, "Measure perplexity, or zero-shot accuracy."),
    ("compare", compare.compare, compare.EXAMPLES, "Compare models by size, speed, quality and text."),
    ("inspect", inspect.inspect, inspect.EXAMPLES, "Show which weights are zero, and in which pattern."),
    ("pack", pack.pack, pack.EXAMPLES, "Write a pruned model with fewer bytes."),
    ("unpack", pack.unpack, pack.UNPACK_EXAMPLES, "Turn a packed model into the dense folder again."),
    ("study", study.study, study.EXAMPLES, "Prune and measure a grid of models and settings."),
    ("report", report.report, report.EXAMPLES, "Write the report of a study."),
):
    app.command(name=_name, cls=Command, short_help=_help, epilog=_examples)(_function)


def usage_line(error: Any) -> str:
    """Return the argument parser's error message as one line that refers to the command's help."""
    message = str(error.format_message()).strip().rstrip(".")
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "thanos"
    return f"{message}; see {command} --help"
