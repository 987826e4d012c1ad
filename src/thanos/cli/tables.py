"""Tables, cells and JSON files, as the commands print and write them."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thanos.errors import ResourceError, remedy_for
from thanos.system.documents import json_text

if TYPE_CHECKING:
    from thanos.system.meter import PhaseRecord

_PLAIN_WIDTH = 140
"""Width in characters if the output is not a terminal: wide enough that nothing is cut."""


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """Print a table on the standard output. If it is too wide, headings have their units on a second line."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, highlight=False)
    table = Table(box=box.SIMPLE, show_header=any(head), title=title, title_justify="left")
    widest = [max(map(len, column)) for column in zip(head, *rows, strict=False)]
    too_wide = sum(widest) + 2 * len(widest) + 2 > console.width
    for index, name in enumerate(head):
        name = name.replace(" (", "\n(") if too_wide else name
        table.add_column(name, overflow="fold", justify="left" if index == 0 or len(head) == 2 else "right")
    for row in rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    console.print(table)


def show_rows(rows: Sequence[tuple[str, str]], values: dict[str, Any], json_file: Path | None) -> None:
    """Print a table of two columns; write ``values`` as JSON if a file is given: the standard output then has JSON alone."""
    write_json(values, json_file)
    if not to_stdout(json_file):
        print_table(("", ""), rows)


def write_json(values: dict[str, Any], json_file: Path | None) -> None:
    """Write ``values`` as JSON to a file, or to the standard output if the path is ``-``. Nothing is written without a path."""
    if json_file is None:
        return
    text = json_text(values)
    if to_stdout(json_file):
        sys.stdout.write(text)
    else:
        try:
            json_file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise _no_json(json_file, error) from error


def to_stdout(path: Path | None) -> bool:
    """Return whether a path is ``-``, the standard output."""
    return path is not None and str(path) == "-"


def check_writable(path: Path | None) -> None:
    """Raise ResourceError, before the work begins, for a file that cannot be written or whose folder does not exist."""
    if path is None or to_stdout(path):
        return
    if path.is_dir():
        raise ResourceError(f"--json {path} is a folder; give a file, or - for the standard output")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise ResourceError(f"--json {path} cannot be written: there is no folder {folder}; create it first")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ResourceError(
            f"--json {path} cannot be written: you have no permission to write there; give another path"
        )
    if not path.exists():
        try:  # some file systems give permission, and create no file
            path.open("ab").close()
            path.unlink()
        except OSError as error:
            raise _no_json(path, error) from error


def _no_json(path: Path, error: OSError) -> ResourceError:
    return ResourceError(
        f"--json {path} cannot be written ({error.strerror}); {remedy_for(error) or 'give another path'}"
    )


def phase_rows(phases: dict[str, PhaseRecord]) -> list[tuple[str, str]]:
    """Return a row for each phase: name, and its seconds and peak memory."""
    return [(name, cost(p.seconds, p.host_peak_bytes, p.device_peak_bytes)) for name, p in phases.items()]


def cost(seconds: float, host: int, device: int | None) -> str:
    """Return a cell with seconds and peak memory; ``host`` and ``device`` are bytes."""
    on_device = "" if device is None else f", device peak {device / 2**30:.2f} GiB"
    return f"{seconds:.1f} s, host peak {host / 2**30:.2f} GiB{on_device}"


def room(needed: int, free: int) -> str:
    """Return a cell with the bytes needed and free, in GiB."""
    return f"{needed / 2**30:.2f} GiB of {free / 2**30:.2f} GiB free"


def share(zeros: int, of: int) -> str:
    """Return a cell with the percentage of zeros and both counts."""
    return f"{100 * zeros / of if of else 0.0:.4f} %  ({zeros:,} of {of:,})"


def number(value: float | None, digits: int = 5) -> str:
    """Return a cell with a number, or ``not measured``."""
    return "not measured" if value is None else f"{value:.{digits}f}"


def score(value: float | None) -> str:
    """Return a cell with a score, or a hyphen if there is none."""
    return "-" if value is None else f"{value:.4f}"


def inside_block(name: str) -> str:
    """Return a layer's name relative to its block, from its full name; the full name of a layer outside the blocks."""
    return re.sub(r"^.*?\.\d+\.", "", name)
