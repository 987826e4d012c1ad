"""The pages that benchmarks/repair_page.py fills show what their result files say."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import ROOT
from helpers import benchmark_script

repair_page = benchmark_script("repair_page")

PAGES = [
    page
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if repair_page.TABLE.search(page.read_text("utf-8"))
]
LINE = {"command": "c", "commit": "abc", "hardware": "h", "torch": "2", "transformers": "5", "date": "2026-01-01"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_what_the_lines_say(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert repair_page.filled(text, page.parent) == text, f"run: python benchmarks/repair_page.py {page}"


def test_rows_columns_and_origin() -> None:
    rows = [
        LINE | {"name": "dense", "perplexity": 21.6081},
        LINE
        | {
            "name": "a",
            "perplexity": 30.0,
            "recipe": {"sparsity": 0.5, "scope": None},
            "seconds": 61.4,
            "phases": {"tune": 20.2},
        },
        LINE
        | {
            "name": "a-recovered-0",
            "perplexity": 28.5,
            "recover": {},
            "zero_shot": {"average": {"acc": 0.4, "acc_stderr": 0.01}},
        },
    ]
    table = repair_page.markdown(repair_page.chosen(rows, ["a*", "dense"])).splitlines()
    assert table[0] == "|  | settings | recovery | perplexity | zero-shot, % | seconds | of them training |"
    assert table[2] == "| a | sparsity 0.5 |  | 30.00 |  | 61 | 20 |"
    assert table[3] == "| a-recovered-0 |  | default | 28.50 | 40.0 ± 1.0 |  |  |"
    assert table[4].startswith("| dense |")
    assert table[-1] == "<sub>`c` at abc, h, torch 2, transformers 5, 2026-01-01</sub>"


def test_a_short_table_has_labels() -> None:
    rows = [LINE | {"name": "dense", "perplexity": 21.608}, LINE | {"name": "a", "perplexity": 30.0, "seconds": 61.4}]
    assert repair_page.short(rows, "dense the dense model; a half of it").splitlines()[2:] == [
        "| the dense model | 21.61 | – | – |",
        "| half of it | 30.00 | – | 61 |",
    ]


def test_a_row_of_several_steps_has_the_seconds_of_all() -> None:
    rows = [
        LINE | {"name": "a", "perplexity": 30.0, "seconds": 61.4},
        LINE | {"name": "b", "perplexity": 28.0, "seconds": 50.3},
    ]
    assert repair_page.short(rows, "a+b both; a one").splitlines()[2:] == [
        "| both | 28.00 | – | 112 |",
        "| one | 30.00 | – | 61 |",
    ]


def test_a_name_without_a_line_is_refused() -> None:
    with pytest.raises(KeyError, match="no line is called b; there are a"):
        repair_page.chosen([LINE | {"name": "a"}], ["b"])
