"""``thanos prune``: prune a model, or predict the time and memory that this takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from thanos.cli.options import (
    SETTINGS,
    Activations,
    Model,
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
from thanos.errors import RecipeError
from thanos.recipe import Recipe
from thanos.settings import Heading
from thanos.system.suggestions import near

EXAMPLES = examples(
    ("Set half of the weights to zero", "thanos prune meta-llama/Llama-3.2-1B pruned"),
    (
        "Keep 2 of 4 weights, calibrated on your own text",
        "thanos prune ./model pruned --pattern 2:4 --calibration text.jsonl",
    ),
    ("Predict memory, disk and time first", "thanos prune ./model pruned --sparsity 0.6 --plan"),
)


@with_settings(*SETTINGS)
def prune(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; appears when it is complete.")],
    *,
    recipe: Annotated[
        Path | None,
        option(
            "TOML file with these options by name. Command-line options override the file; its [[override]] tables still apply",
            Heading.WHAT,
            "FILE",
        ),
    ] = None,
    measure_error: Annotated[
        str | None,
        option(
            "Tokens on which layer errors are measured: all, none, or auto (all if the method needs XᵀX, else a sample); "
            "changes no weight",
            Heading.CALIBRATION,
            "WHICH",
            default="auto",
        ),
    ] = None,
    activations: Activations = "auto",
    threads: Threads = None,
    resume: Annotated[bool, resume_option("OUT")] = False,
    plan: Annotated[
        bool,
        option(
            "Only predict memory, disk and time, and name resources that do not suffice",
            Heading.RUN,
            None,
            "--plan",
            default="prune",
        ),
    ] = False,
    overwrite: Annotated[bool, overwrite_option("Replace OUT, and discard an interrupted run")] = False,
    json_file: Annotated[
        Path | None,
        option(
            "With --plan, write the prediction as JSON, - for the standard output", Heading.OUTPUT, "FILE", "--json"
        ),
    ] = None,
    quiet: Quiet = False,
    **settings: Any,
) -> None:
    """Prune MODEL and write it to OUT as a plain Hugging Face checkpoint."""
    chosen = merge_recipe(recipe, given(settings) | _error_setting(measure_error))
    if json_file is not None and not plan:
        raise RecipeError(
            "--json needs --plan: give --plan too, or leave --json out; the report of a run is OUT/pruning.json"
        )
    if plan and resume:
        raise RecipeError("--plan predicts a whole run, not a resumed one; leave out --resume or --plan")
    use_threads(threads)
    from thanos.cli import interrupts as ending
    from thanos.cli import output, tables
    from thanos.cli import progress as display
    from thanos.system import ranks

    display.hush()
    import thanos
    from thanos.run.work_folder import WorkFolder

    if plan:
        tables.check_writable(json_file)
        with display.watch(quiet=quiet) as watcher:
            found = thanos.plan(model, out, chosen, overwrite=overwrite, activations=activations, on_event=watcher)
        output.show_plan(found, json_file)
        return
    work = WorkFolder(out)
    complete = resume and not overwrite and work.is_complete
    with ending.resumable(work), display.watch(quiet=quiet, silent=not ranks.is_main_process()) as watcher:
        report = thanos.prune(
            model, out, chosen, overwrite=overwrite, resume=resume, activations=activations, on_event=watcher
        )
    if ranks.is_main_process():
        output.show_report(report, out, complete=complete, said=watcher.notes)


def _error_setting(which: str | None) -> dict[str, bool | None]:
    """Return the recipe's ``measure_error`` for the value of ``--measure-error``; empty if the option is not given."""
    values = {"all": True, "none": False, "auto": None}
    if which is None:
        return {}
    if which not in values:
        raise RecipeError(f"--measure-error must be one of {', '.join(values)}; got {which!r}{near(which, values)}")
    return {"measure_error": values[which]}


def merge_recipe(path: Path | None, flags: dict[str, Any]) -> Recipe:
    """Return the recipe of a file, or the default one, overridden by the settings of the command line.

    If an option changes the pattern, the method or the effort, settings of the file that belong to the old one are dropped; see
    :meth:`Recipe.suited <thanos.recipe.Recipe.suited>`. Raises RecipeError if the file or the result is not a valid recipe.
    """
    if path is None:
        return Recipe(**flags)
    base = Recipe.from_toml(path)
    if not path.stat().st_size:
        raise RecipeError(f"recipe {path} is empty; write a setting such as sparsity = 0.5, or leave --recipe out")
    if base.trust_remote_code and not flags.get("trust_remote_code"):
        raise RecipeError(
            f"recipe {path} sets trust_remote_code, which a file cannot allow; read the Python code that comes with the "
            "checkpoint, then give --trust-remote-code"
        )
    return base.replace(**base.suited(flags))
