"""Fill the tables and texts of a page from a comparison.json that thanos compare wrote.

    python benchmarks/quality_page.py docs/results/quality.md [--check]

The script writes below each of these comments, up to ``<!-- end -->``. FILE is a path relative to the page.

``<!-- models FILE: * -->``: the table of the comparison's page.
``<!-- models FILE: LABEL = WORDS; … -->``: a table of the named models only, with bytes, speed, perplexity and
zero-shot accuracy.
``<!-- texts FILE: NUMBER; LABEL = WORDS; … -->``: the beginnings of what these models write for prompt NUMBER, counted from 1.

``--check`` writes nothing, and fails if the page differs.
"""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

from repair_page import fill_page

from thanos.comparison.document import Comparison, Row, merged, read_comparisons
from thanos.comparison.report import build_report, number_of
from thanos.study.report.tables import to_markdown

BLOCK = re.compile(r"(<!-- (models|texts) (\S+): ([^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)

_LETTERS = 130
"""Number of characters to which a model's text is shortened."""


def main() -> int:
    """Write the page, or compare it."""
    return fill_page(__doc__, filled)


def filled(page: str, folder: Path) -> str:
    """Return the page with its tables and texts filled."""

    def block(match: re.Match[str]) -> str:
        head, kind, file, words, end = match.groups()
        runs = read_comparisons([folder / file])
        if kind == "texts":
            number, _, names = words.partition(";")
            made = texts(merged(runs), int(number), names)
        else:
            made = whole(runs) if words == "*" else models(merged(runs), words)
        return f"{head}{made}{end}"

    return BLOCK.sub(block, page)


def whole(runs: list[Comparison]) -> str:
    """Return the table of the comparison's page, and where its numbers come from."""
    table = to_markdown(build_report(runs).tables[0])
    return "\n".join([table.strip(), "", *(f"<sub>{origin(run)}</sub>" for run in runs), ""])


def origin(run: Comparison) -> str:
    """Return the command, commit, hardware, versions and date of a run."""
    machine = run.machine
    packages = {**machine["versions"], **machine}
    versions = [f"{name} {packages[name]}" for name in ("torch", "transformers", "torchao") if name in packages]
    commit = machine["commit"][:7] if machine["commit"] else "an unknown commit"
    return f"`{run.command}` at {commit}, {machine['device']}, {', '.join(versions)}, {machine['date']}"


def models(rows: list[Row], names: str) -> str:
    """Return a table with a line for each ``LABEL = WORDS`` of ``names``."""
    lines = ["| | in memory, MB | tokens/s | perplexity | zero-shot, % |", "|---|---|---|---|---|"]
    for row, words in chosen(rows, names):
        size, speed, perplexity, accuracy, error = (
            "" if (number := number_of(row, field)) is None else number.text
            for field in ("weight_bytes", "tokens_per_second", "perplexity", "zero_shot", "zero_shot_stderr")
        )
        lines.append(f"| {words} | {size} | {speed} | {perplexity} | {f'{accuracy} ± {error}' if accuracy else ''} |")
    return "\n".join(lines) + "\n"


def texts(rows: list[Row], number: int, names: str) -> str:
    """Return the prompt with this number, and a line for each ``LABEL = WORDS`` of ``names`` with the model's text."""
    prompt = list(rows[0].texts)[number - 1]
    lines = [f"“{prompt}” is continued by", ""]
    for row, words in chosen(rows, names):
        text = textwrap.shorten(row.texts[prompt], _LETTERS, placeholder=" …")
        lines.append(f"- {words}: “{text}”")
    return "\n".join(lines) + "\n"


def chosen(rows: list[Row], names: str) -> list[tuple[Row, str]]:
    """Return each named row with its words.

    Raises:
        KeyError: no row has one of the labels.
    """
    by_label = {row.label: row for row in rows}
    found: list[tuple[Row, str]] = []
    for entry in names.split(";"):
        label, _, words = (part.strip() for part in entry.partition("="))
        if label not in by_label:
            raise KeyError(f"no model is called {label}; there are {', '.join(by_label)}")
        found.append((by_label[label], words))
    return found


if __name__ == "__main__":
    sys.exit(main())
