"""``thanos recover``: train a pruned model with its zeros fixed, towards its dense parent."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from thanos.cli.options import (
    JsonFile,
    Quiet,
    Threads,
    examples,
    given,
    option,
    overwrite_option,
    resume_option,
    use_threads,
    with_settings,
)
from thanos.recovery.recipe import RecoveryRecipe
from thanos.settings import Heading, settings_of

EXAMPLES = examples(
    (
        "Recover a model that prune wrote, on the same text",
        "thanos recover pruned recovered --dense meta-llama/Llama-3.2-1B",
    ),
    (
        "Train longer on your own text, with less memory",
        "thanos recover pruned recovered --dense ./model --calibration text.jsonl --epochs 20 --micro-batch 1",
    ),
)


@with_settings(*settings_of(RecoveryRecipe), owner=RecoveryRecipe)
def recover(
    pruned: Annotated[
        str, typer.Argument(metavar="OUT", help="The pruned model: a folder or a hub name.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT2", help="The folder to write; appears when it is complete.")],
    *,
    dense: Annotated[str, option("The model that OUT was pruned from", Heading.RECOVERY, "MODEL")],
    threads: Threads = None,
    resume: Annotated[bool, resume_option("OUT2")] = False,
    overwrite: Annotated[bool, overwrite_option("Replace OUT2, and discard an interrupted run")] = False,
    json_file: JsonFile = None,
    quiet: Quiet = False,
    **settings: Any,
) -> None:
    """Train the remaining weights of OUT towards the dense model, keep its zeros, and write the result to OUT2."""
    recipe = RecoveryRecipe(**given(settings))
    use_threads(threads)
    from thanos.cli import interrupts as ending
    from thanos.cli import output, tables
    from thanos.cli import progress as display
    from thanos.system import ranks

    display.hush()
    tables.check_writable(json_file)
    import thanos
    from thanos.recovery.states import RecoveryFolder

    work = RecoveryFolder(out)
    complete = resume and not overwrite and work.is_complete
    with ending.resumable(work), display.watch(quiet=quiet or not ranks.is_main_process()) as watcher:
        report = thanos.recover(
            pruned, out, dense=dense, recipe=recipe, overwrite=overwrite, resume=resume, on_event=watcher
        )
    if ranks.is_main_process():
        output.show_recovery(report, out, json_file, complete=complete, said=watcher.notes)
