"""The committed reports under docs/results/ and the tables in its pages agree with their stores."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from conftest import ROOT
from thanos.study.report.build import build_report
from thanos.study.report.page import render_page
from thanos.study.report.readme import result_folders, with_results
from thanos.study.report.tables import WRITERS
from thanos.study.store import read_store, store_path

STORES = sorted({store_path(path.parent) for path in (ROOT / "docs" / "results").glob("*/store.jsonl*")})
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
    report = build_report(read_store(path))
    pictures: dict[str, str] = {}
    for table in report.tables:
        for ending, writer in WRITERS.items():
            assert (path.parent / "tables" / f"{table.name}.{ending}").read_text(encoding="utf-8") == writer(table)
    for figure in report.figures:
        pictures[figure.name] = (path.parent / "figures" / f"{figure.name}.svg").read_bytes().decode()
        root = ET.fromstring(pictures[figure.name])
        description = root.find(".//{http://purl.org/dc/elements/1.1/}description")
        assert description is not None
        assert json.loads(description.text or "") == figure.to_dict(), f"run: thanos report {path.parent}"
    page = render_page(report.title, report.lead, report.chapters, pictures).encode()
    same = (path.parent / "report.html").read_bytes() == page  # a comparison by assert would show megabytes
    assert same, f"report.html: run: thanos report {path.parent}"
