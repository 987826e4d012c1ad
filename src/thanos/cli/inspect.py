"""``thanos inspect``: which weights are zero, NaN or infinite."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from thanos import registry
from thanos.cli.options import JsonFile, Model, Quiet, examples, given, option, with_settings
from thanos.settings import Heading

EXAMPLES = examples(
    ("Show how many weights of each layer are zero, and in which pattern", "thanos inspect pruned"),
    ("Exit with 1 unless every pruned layer keeps at most 2 of 4 weights", "thanos inspect pruned --require 2:4"),
    ("Show which parts of its dense model a smaller model lacks", "thanos inspect smaller --dense MODEL"),
)


@with_settings("trust_remote_code")
def inspect(
    model: Model,
    *,
    require: Annotated[
        str | None,
        option(
            f"Exit with 1 unless every pruned layer satisfies this pattern: {registry.required_patterns()}",
            Heading.CHECKS,
            "PATTERN",
        ),
    ] = None,
    dense: Annotated[
        str | None,
        option("If MODEL is smaller, also count the parts of this dense model that it lacks", Heading.CHECKS, "MODEL"),
    ] = None,
    json_file: JsonFile = None,
    quiet: Quiet = False,
    **settings: Any,
) -> None:
    """Read the weights of MODEL; show which are zero, in which pattern, which are dense, and which are NaN or infinite.

    Exits with 1 if a parameter holds NaN or infinity, or if a layer violates --require.
    """
    from thanos.cli import output, tables
    from thanos.cli import progress as display

    display.hush()
    from thanos.evaluation.inspect import inspect_checkpoint

    tables.check_writable(json_file)
    with display.watch(quiet=quiet) as watcher:
        found = inspect_checkpoint(model, require=require, dense=dense, on_event=watcher, **given(settings))
    output.show_inspection(found, json_file)
    if found.violations or found.damaged:
        raise typer.Exit(1)
