"""The committed reports and comparisons under docs/results/ and the tables in its pages agree with their stores."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from conftest import ROOT
from thanos.comparison import report as comparison
from thanos.comparison.document import NAME, read_comparisons
from thanos.study.report.build import Report, build_report
from thanos.study.report.page import render_page
from thanos.study.report.readme import result_folders, with_results
from thanos.study.report.tables import WRITERS
from thanos.study.store import read_store, store_path

STORES = sorted({store_path(path.parent) for path in (ROOT / "docs" / "results").glob("*/store.jsonl*")})
COMPARISONS = sorted((ROOT / "docs" / "results").rglob(NAME))
PAGE = ROOT / "docs" / "results" / "study.md"


def test_the_page_of_the_study_shows_what_its_store_says() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert result_folders(text) == ["smollm2-135m"]
    same = with_results(text, PAGE.parent) == text
    assert same, f"run: thanos report docs/results/smollm2-135m --readme {PAGE.relative_to(ROOT)}"


def test_the_page_of_accuracies_shows_what_its_records_say() -> None:
    text = (PAGE.parent / "accuracy.md").read_text(encoding="utf-8")
    lines = (PAGE.parent / "accuracy" / "concatenated.jsonl").read_text(encoding="utf-8").splitlines()
    measured = [
        (
            {f"{one['concatenated']:,.{digits}f}" for digits in (0, 2)},
            {f"{one['blank_line']:,.{digits}f}" for digits in (0, 2)},
        )
        for one in map(json.loads, lines)
    ]
    shown = re.findall(r"^\|[^|]*\|[^|]*\| \*\*(.*?)\*\* \|[^|]*\| (.*?) \|", text, re.M)
    assert len(shown) == 22
    for ours, blank_line in shown:
        assert any(ours in own and blank_line in joined for own, joined in measured), (ours, blank_line)


@pytest.mark.skipif(not STORES, reason="no store is committed yet")
@pytest.mark.parametrize("path", STORES, ids=lambda path: path.parent.name)
def test_tables_figures_and_page_are_what_the_store_says(path: Path) -> None:
    check(build_report(read_store(path)), path.parent, "report.html", f"thanos report {path.parent}")


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.parent.name)
def test_tables_figures_and_page_of_a_comparison_are_what_its_document_says(path: Path) -> None:
    report = comparison.build_report(read_comparisons([path]))
    check(report, path.parent, comparison.PAGE, f"thanos compare {path} --out {path.parent}")


def check(report: Report, folder: Path, name: str, command: str) -> None:
    """Assert that a folder has the report's tables and figures, and no others, and its page."""
    pictures: dict[str, str] = {}
    for table in report.tables:
        for ending, writer in WRITERS.items():
            assert (folder / "tables" / f"{table.name}.{ending}").read_text(encoding="utf-8") == writer(table)
    for figure in report.figures:
        pictures[figure.name] = (folder / "figures" / f"{figure.name}.svg").read_bytes().decode()
        root = ET.fromstring(pictures[figure.name])
        description = root.find(".//{http://purl.org/dc/elements/1.1/}description")
        assert description is not None
        assert json.loads(description.text or "") == figure.to_dict(), f"run: {command}"
    assert {file.stem for file in (folder / "tables").iterdir()} == {table.name for table in report.tables}
    assert {file.stem for file in (folder / "figures").iterdir()} == set(pictures)
    page = render_page(report.title, report.lead, report.chapters, pictures).encode()
    same = (folder / name).read_bytes() == page  # a comparison by assert would show megabytes
    assert same, f"{name}: run: {command}"


def test_the_readme_gives_the_options_with_which_the_models_of_its_table_were_recovered() -> None:
    """The options were those of another model once."""
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    lines = (PAGE.parent / "repair" / "qwen2.5-coder-0.5b-h200.jsonl").read_text(encoding="utf-8").splitlines()
    recovered = {record["name"]: record.get("recover") for record in map(json.loads, lines)}
    for name, words in (("16of32-f", "(16:32)"), ("neurons20-f", "(a fifth of the neurons removed)")):
        settings = recovered[f"{name}-recovered-0"]
        options = " ".join(
            f"--{key} {f'{value:.0e}'.replace('e-0', 'e-') if key == 'rate' else value}"
            for key, value in settings.items()
        )
        assert f"`{options}` {words}" in text
