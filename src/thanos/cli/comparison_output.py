"""The output of ``thanos compare``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from thanos.cli.tables import print_table
from thanos.errors import ResourceError, UserError
from thanos.run.work_folder import holds_model, refuse_inside_model

if TYPE_CHECKING:
    from thanos.comparison.document import Comparison


def check_writable_folder(out: Path) -> None:
    """Raise UserError, before the work begins, if ``out`` is a file, is in a model's folder, or may not be written."""
    if out.exists() and not out.is_dir():
        raise ResourceError(f"--out {out} is a file; give a folder")
    if holds_model(out):
        raise UserError(f"--out {out} is the folder of a model; choose a folder outside it")
    refuse_inside_model(out, "--out")
    nearest = next(path for path in (out.resolve(), *out.resolve().parents) if path.exists())
    if not nearest.is_dir():
        raise ResourceError(f"--out {out} cannot be written: {nearest} is a file; choose a path in a folder")
    if not os.access(nearest, os.W_OK):
        raise ResourceError(
            f"--out {out} cannot be written: you have no permission to write there; give another folder"
        )


def refuse_measurements(out: Path) -> None:
    """Raise UserError if ``out`` has measurements of an earlier comparison, which new ones would replace."""
    from thanos.comparison.document import NAME

    if (out / NAME).exists():
        raise UserError(
            f"{out / NAME} has the measurements of an earlier comparison; give --out with another folder, or --overwrite to "
            "replace them"
        )


def show_comparison(runs: Sequence[Comparison], out: Path) -> None:
    """Print the tables of a comparison, the reasons of failures, and the path of the page."""
    from thanos.comparison.report import PAGE, build_report

    report = build_report(runs)
    for table in report.tables:
        if not table.name.startswith("comparison"):
            continue
        kept = [index for index, column in enumerate(table.columns) if column.name != "notes"]
        head = [table.columns[index].head for index in kept]
        print_table(head, [[row[index].shown for index in kept] for row in table.rows])
    for row in (row for run in runs for row in run.failed):
        print(f"{row.label}: {row.reason}", file=sys.stderr)
    print_table(("", ""), [("page", str(out / PAGE)), ("numbers", str(out / "comparison.json"))])
