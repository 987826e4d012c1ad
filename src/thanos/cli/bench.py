"""``thanos bench``: how fast, how exact, how far from the floor."""

from __future__ import annotations

import typer

from thanos.cli.arguments import Command, Group
from thanos.cli.bench_layer import layer
from thanos.cli.bench_model import model

bench = typer.Typer(
    name="bench",
    cls=Group,
    help="Measure how fast this machine prunes, beside the least that it needs.",
    short_help="Measure how fast this machine prunes.",
    rich_markup_mode=None,
)


bench.command(cls=Command, short_help="Time the solvers on one layer.")(layer)
bench.command(cls=Command, short_help="Time pruning a whole model of random weights.")(model)
