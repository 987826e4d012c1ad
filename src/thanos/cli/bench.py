"""``thanos bench``: speed and accuracy of the solvers, compared with the least time needed."""

from __future__ import annotations

import typer

from thanos.cli import bench_layer, bench_model
from thanos.cli.arguments import Command, Group

bench = typer.Typer(
    name="bench",
    cls=Group,
    help="Measure how fast this machine prunes, and compare with the least time that it needs.",
    short_help="Measure how fast this machine prunes.",
    rich_markup_mode=None,
)

for _function, _examples, _help in (
    (bench_layer.layer, bench_layer.EXAMPLES, "Time the solvers on one layer."),
    (bench_model.model, bench_model.EXAMPLES, "Time pruning a whole model of random weights."),
):
    bench.command(cls=Command, short_help=_help, epilog=_examples)(_function)
