"""``thanos bench``: how fast, how exact, how far from the floor."""

from __future__ import annotations

import typer

from thanos.cli.bench_layer import layer
from thanos.cli.bench_model import model

bench = typer.Typer(
    name="bench",
    help="Measure how fast this machine prunes, beside the least that it needs.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


bench.command()(layer)
bench.command()(model)
