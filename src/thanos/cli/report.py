"""``thanos report``: the report of a study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from thanos.cli.options import Quiet, examples, option
from thanos.settings import Heading

EXAMPLES = examples(
    ("Write results/report.html, its tables and its figures", "thanos report results"),
    ("Also update the table and figure of a README", "thanos report results --readme README.md"),
)


def report(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A study's folder, which holds store.jsonl.")],
    readme: Annotated[
        Path | None,
        option("Also write the headline table and figure into this file, between its markers", Heading.OUTPUT, "FILE"),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write the report of the study in OUT: report.html, tables and figures."""
    from thanos.cli import output
    from thanos.cli import progress as display
    from thanos.study.report.build import write_report
    from thanos.study.report.readme import update_readme
    from thanos.study.store import read_store, store_path

    warnings = read_store(out).warnings
    with display.watch(quiet=quiet) as watcher:
        found = write_report(out, on_event=watcher)
    if readme is not None:
        update_readme(readme, store_path(out).parent)
    output.show_study_report(found, out, warnings, readme)
