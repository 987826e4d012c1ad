"""``thanos bench``: speed and accuracy of the solvers, compared with the least time needed; speed of packed models."""

from __future__ import annotations

import typer

from thanos.cli import bench_decode, bench_layer, bench_model
from thanos.cli.arguments import Command, Group

bench = typer.Typer(
    name="bench",
    cls=Group,
    help="Measure how fast this machine prunes, and how fast packed models decode, beside the least time needed.",
    short_help="Measure how fast this machine prunes.",
    rich_markup_mode=None,
)

for _function, _examples, _help in (
    (bench_layer.layer, bench_layer.EXAMPLES, "Time the solvers on one layer."),
    (bench_model.model, bench_model.EXAMPLES, "Time pruning a whole model of random weights."),
    (bench_decode.decode, bench_decode.EXAMPLES, "Time decoding of a packed model."),
):
    bench.command(cls=Command, short_help=_help, epilog=_examples)(_function)
