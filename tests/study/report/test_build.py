"""The files of a report, read back and compared with the store, number by number; the page in a real browser."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import json
import random
import re
import statistics
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import study_records
from study_records import MODEL, cell, contents, cost_study, failed, full_study, record, write_store
from thanos.cli import run
from thanos.errors import DataError
from thanos.study.report.build import build_report, write_report
from thanos.study.report.numbers import Number, plain
from thanos.study.report.readme import update_readme, with_results
from thanos.study.report.sections.common import FOOTNOTES
from thanos.study.store import CellRecord

PATHS = {
    "perplexity": ("evaluation", "perplexity"),
    "kl_divergence": ("evaluation", "kl_divergence"),
    "top1_agreement": ("evaluation", "top1_agreement"),
    "zero_shot": ("zero_shot", "average", "acc"),
    "zero_shot_stderr": ("zero_shot", "average", "acc_stderr"),
    "sparsity": ("effective_sparsity", "targeted"),
    "sparsity_asked": ("cell", "sparsity"),
    "sparsity_all": ("effective_sparsity", "all"),
    "seconds": ("seconds",),
    "solve_seconds": ("phases", "solve", "seconds"),
    "alpha": ("cell", "outlier_rows"),
    "block_size": ("cell", "block_size"),
    "damping": ("cell", "damping"),
}
"""Where a field stands in a line of the store: written down here once more, so that a wrong reader is found."""


class Store:
    """The raw lines of a store, and what a number of a report should be by them."""

    def __init__(self, folder: Path) -> None:
        lines = (folder / "store.jsonl").read_text(encoding="utf-8").splitlines()
        self.records = {(one := json.loads(line))["key"][:12]: one for line in lines}

    def field(self, key: str, name: str) -> float:
        one = self.records[key]
        kind, _, rest = name.partition(":")
        if name == "layer_error":
            return statistics.mean(layer["error_after_compensation"] for layer in one["layers"])
        if kind in ("error", "raw_error", "zeros"):
            layer = next(layer for layer in one["layers"] if layer["name"] == rest)
            return layer[
                {"error": "error_after_compensation", "raw_error": "error_before_compensation", "zeros": "sparsity"}[
                    kind
                ]
            ]
        if kind in ("task", "task_stderr"):
            return one["zero_shot"]["tasks"][rest]["acc" if kind == "task" else "acc_stderr"]
        if name == "peak_bytes":
            pruning = {"load", "calibration", "statistics", "solve", "propagate", "write", "finish"}
            held = min(phase["device_peak_bytes"] for at, phase in one["phases"].items() if at in pruning)
            return one["device_peak_bytes"] - held
        value: Any = one
        for part in PATHS[name]:
            value = value[part]
        return value

    def expected(self, how: str, name: str, cells: list[str], minus: list[str]) -> float:
        if name == "cells":
            assert all(key in self.records for key in cells)
            return len(set(cells))
        values = [self.field(key, name) for key in cells]
        others = [self.field(key, name) for key in minus]
        if how == "value":
            assert len(set(values)) == 1
            return values[0]
        if how == "spread":
            return statistics.stdev(values)
        if how == "mean":
            return statistics.mean(values)
        change = statistics.mean(values) - statistics.mean(others)
        if how == "difference":
            return change
        if how == "gain":
            return -change / statistics.mean(others)
        assert how == "price"
        seconds = [statistics.mean(self.field(key, "seconds") for key in keys) for keys in (cells, minus)]
        return (seconds[0] - seconds[1]) / -change


class Page(HTMLParser):
    """The numbers of a page, and its tables as rows of cells; a cell is its text and the numbers in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.numbers: list[dict[str, str]] = []
        self.tables: dict[str, list[list[tuple[str, list[dict[str, str]]]]]] = {}
        self.links: list[str] = []
        self._table, self._cell, self._number = "", False, False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.links += [value for name, value in values.items() if name in ("href", "src", "xlink:href")]
        if tag == "table":
            self._table = values["id"].removeprefix("table-")
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag == "td":
            self._cell = True
            self.tables[self._table][-1].append(("", []))
        elif tag == "data":
            self.numbers.append({**values, "text": ""})
            self._number = True
            if self._cell:
                self.tables[self._table][-1][-1][1].append(self.numbers[-1])

    def handle_endtag(self, tag: str) -> None:
        if tag == "td":
            self._cell = False
        elif tag == "data":
            self._number = False

    def handle_data(self, data: str) -> None:
        if self._number:
            self.numbers[-1]["text"] += data
        if self._cell:
            text, numbers = self.tables[self._table][-1][-1]
            self.tables[self._table][-1][-1] = (text + data, numbers)


@pytest.fixture(scope="module")
def page(study_report: Path) -> Page:
    return Page((study_report / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def store(study_report: Path) -> Store:
    return Store(study_report)


def test_every_number_of_the_page_is_the_stores(page: Page, store: Store) -> None:
    assert len(page.numbers) > 2000
    for one in page.numbers:
        expected = store.expected(
            one["data-how"], one["data-field"], one["data-cells"].split(), one.get("data-minus", "").split()
        )
        assert float(one["value"]) == pytest.approx(expected, rel=1e-12, abs=1e-15), one
    assert {one["data-how"] for one in page.numbers} == {"value", "mean", "spread", "difference", "gain", "price"}


def test_differences_compare_the_same_seeds_whatever_seeds_rows_have() -> None:
    draw = random.Random(7)
    whole = full_study(blocks=1)
    compared = 0
    for share in (0.4, 0.7, 0.95):
        part = [one for one in whole if draw.random() < share or one.cell["method"] == "dense"]
        part = [one if draw.random() < 0.6 else dataclasses.replace(one, zero_shot=None) for one in part]
        report, seeds = build_report(contents(part)), {one.key[:12]: one.cell["seed"] for one in part}
        prose = [words for chapter in report.chapters for s in chapter.sections for words in (*s.prose, *s.missing)]
        cells = [cell for table in report.tables for row in table.rows for cell in row]
        prose += [cell.prose for cell in cells] + [(cell.number,) for cell in cells]
        for found in (part for words in prose for part in words if isinstance(part, Number)):
            if found.minus and found.field != "sparsity":
                assert sorted(seeds[key] for key in found.cells) == sorted(seeds[key] for key in found.minus), found
                compared += 1
    assert compared > 100


def test_every_number_that_is_shown_is_its_value_rounded(page: Page) -> None:
    scales = {
        "sparsity": 100,
        "sparsity_asked": 100,
        "sparsity_all": 100,
        "zero_shot": 100,
        "zero_shot_stderr": 100,
        "top1_agreement": 100,
        "peak_bytes": 2**-30,
    }
    for one in page.numbers:
        shown = one["text"].replace(",", "").replace("−", "-").replace("+", "").removesuffix(" %")
        if "×" in shown:
            digits, power = shown.split(" × 10")
            shown = f"{digits}e{power.translate(str.maketrans('⁰¹²³⁴⁵⁶⁷⁸⁹⁻', '0123456789-'))}"
        kind = one["data-field"].partition(":")[0]
        scale = 100 if one["data-how"] == "gain" or kind in ("task", "zeros") else scales.get(kind, 1)
        value = float(one["value"]) * (1 if one["data-how"] == "price" else scale)
        locations = len(shown.partition("e")[0].partition(".")[2])
        unit = 10.0 ** (int(shown.partition("e")[2] or 0) - locations)
        assert abs(float(shown) - value) <= 0.5000001 * unit + 1e-12 * abs(value), one


def test_tables_as_files_hold_the_pages_numbers(page: Page, study_report: Path) -> None:
    assert {path.stem for path in (study_report / "tables").glob("*.csv")} == set(page.tables)
    for name, rows in page.tables.items():
        body = [row for row in rows if row]
        lines = list(csv.reader(io.StringIO((study_report / "tables" / f"{name}.csv").read_text(encoding="utf-8"))))
        markdown = (study_report / "tables" / f"{name}.md").read_text(encoding="utf-8")
        latex = (study_report / "tables" / f"{name}.tex").read_text(encoding="utf-8")
        assert len(lines) == len(body) + 1, name
        for row, line in zip(body, lines[1:], strict=True):
            in_csv = [float(value) for value in line if re.fullmatch(r"-?\d[\d.]*(e[+-]?\d+)?", value)]
            in_page = [
                float(n["value"])
                for text, numbers in row
                for n in numbers
                if len(numbers) <= 2 and "against" not in text
            ]
            if name != "claims":
                assert [value for value in in_page if value not in in_csv] == [], (name, line)
            for text, numbers in row:
                assert not numbers or text in markdown.replace("**", ""), (name, text)
        assert latex.count("{") == latex.count("}"), name
        assert latex.isascii(), (name, {letter for letter in latex if not letter.isascii()})


def test_every_figure_carries_the_stores_numbers(page: Page, store: Store, study_report: Path) -> None:
    text = (study_report / "report.html").read_text(encoding="utf-8")
    match = re.search(r'<script type="application/json" id="figures">(.*?)</script>', text, re.DOTALL)
    assert match
    embedded = json.loads(match[1].replace("<\\/", "</"))
    files = sorted((study_report / "figures").glob("*.svg"))
    assert [path.stem for path in files] == sorted(embedded)
    assert [path.stem for path in files] == sorted(path.stem for path in (study_report / "figures").glob("*.png"))
    numbers = 0
    for path in files:
        root = ET.fromstring(path.read_text(encoding="utf-8"))
        description = root.find(".//{http://purl.org/dc/elements/1.1/}description")
        assert description is not None
        data = json.loads(description.text or "")
        assert data == embedded[path.stem]
        for one in _numbers(data):
            expected = store.expected(one["how"], one["field"], one["cells"], one.get("minus", []))
            assert one["value"] == pytest.approx(expected, rel=1e-12, abs=1e-15)
            numbers += 1
    assert numbers > 500


def _numbers(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        own = [value] if "how" in value else []
        return own + [one for item in value.values() for one in _numbers(item)]
    return [one for item in value for one in _numbers(item)] if isinstance(value, list) else []


def test_the_page_needs_nothing_but_itself(page: Page, study_report: Path) -> None:
    assert all(link.startswith(("#", "data:")) for link in page.links), page.links
    text = (study_report / "report.html").read_text(encoding="utf-8")
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_on_a_phone_every_number_has_its_heading(study_report: Path) -> None:
    """A narrow screen has no row of headings. Each cell shows its own, except a name in the first column."""
    text = (study_report / "report.html").read_text(encoding="utf-8")
    rule = r'#table-(\w+) td:nth-child\((\d+)\)::before\{content:"(.*?)"\}'
    shown = {(name, int(place)): heading for name, place, heading in re.findall(rule, text)}
    tables = re.findall(r'<table id="table-(\w+)">\s*<thead><tr>(.*?)</tr>', text)
    assert len(tables) > 10
    numbered = set()
    for name, heads in tables:
        for place, (kind, heading) in enumerate(re.findall(r'<th scope="col"( class="text")?>(.*?)</th>', heads), 1):
            assert heading, f"{name} has a column without a heading"
            if place > 1 or not kind:
                assert shown.pop((name, place)).replace("\\200b ", "").replace("\\3c ", "<") == html.unescape(heading)
                numbered |= {heading} if place == 1 else set()
    assert not shown
    assert {"α", "B", "requested sparsity (%)"} <= numbered


def test_anchors_and_names_are_unique(study_report: Path) -> None:
    text = (study_report / "report.html").read_text(encoding="utf-8")
    names = re.findall(r'\bid="([^"]+)"', text)
    assert len(names) == len(set(names))
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(names)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(names)


def test_what_failed_is_listed_with_its_reason(study_report: Path) -> None:
    text = (study_report / "report.html").read_text(encoding="utf-8")
    assert "sparsity 0.95 &lt;is&gt; too much" in text
    assert "sparsity 0.95 <is> too much" in (study_report / "tables" / "failed.csv").read_text(encoding="utf-8")


def test_the_same_store_gives_the_same_bytes_and_stale_files_go(tmp_path: Path) -> None:
    records = [record(cell(method)) for method in ("thanos", "wanda")] + [record(cell("dense", None))]
    folder = write_store(tmp_path / "study", records)
    write_report(folder)
    first = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
    (folder / "figures" / "old.svg").write_text("from an earlier report")
    write_report(folder)
    assert {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*") if path.is_file()} == first


def test_two_models_have_files_of_their_own(tmp_path: Path) -> None:
    records = [record(cell(method, model=model)) for model in ("org/a", "b") for method in ("thanos", "wanda")]
    report = write_report(write_store(tmp_path / "study", records))
    names = [table.name for table in report.tables]
    assert {"summary_org-a", "summary_b", "table2", "cells"} <= set(names)
    assert len(names) == len(set(names))


def test_a_store_of_failures_alone_is_reported(tmp_path: Path) -> None:
    report = write_report(write_store(tmp_path / "study", [failed(cell(), "out of memory")]))
    assert report.table("failed") is not None
    assert report.lead[0] == "No pruned model has a result to compare."
    page = re.sub("<[^>]*>", "", (tmp_path / "study" / "report.html").read_text(encoding="utf-8"))
    assert "1 cell; the next run repeats it." in page


def test_a_model_of_which_every_cell_failed_does_not_end_the_report_of_the_others(tmp_path: Path) -> None:
    records = [record(cell(method, model="org/a")) for method in ("thanos", "wanda")]
    records += [
        failed(cell(method, model=model), "NaN") for model in ("org/b", "org/c") for method in ("thanos", "wanda")
    ]
    report = write_report(write_store(tmp_path / "study", records))
    assert [chapter.title for chapter in report.chapters] == ["org/a", ""]
    table = report.table("failed")
    assert table is not None
    assert len(table.rows) == 4
    assert "4 cells failed" in "".join(str(getattr(part, "text", part)) for part in report.lead)


def test_a_study_with_a_dense_result_alone_does_not_say_that_nothing_was_evaluated(tmp_path: Path) -> None:
    report = write_report(
        write_store(tmp_path / "study", [record(cell("dense", None)), failed(cell(), "out of memory")])
    )
    assert report.lead[0] == "No pruned model has a result to compare."


def own_study(*, seeds: int = 1) -> list[CellRecord]:
    """A user's study: two methods, a pattern of the paper and one that it lacks, two sparsities."""
    cells = [cell(m, sparsity=share, seed=s) for m in ("thanos", "wanda") for share in (0.3, 0.5) for s in range(seeds)]
    cells += [cell(m, "16:32", seed=s) for m in ("thanos", "wanda") for s in range(seeds)]
    return [record(cell("dense", None)), *(record(one) for one in cells)]


@pytest.fixture
def small_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The synthetic numbers have no harm of their own for 16:32."""
    monkeypatch.setitem(study_records._PATTERN_HARM, "16:32", 1.3)


@pytest.mark.usefixtures("small_patterns")
def test_a_users_study_is_shown_as_a_whole_and_nothing_else(tmp_path: Path) -> None:
    report = write_report(write_store(tmp_path / "study", own_study()))
    sections = [s for chapter in report.chapters for s in chapter.sections]
    assert all(s.tables or s.figures for s in sections)
    assert not {"alpha", "blocks", "outliers", "noise", "scope", "repair"} & {s.name for s in sections}
    table = report.table("summary")
    assert table is not None
    assert list(table.bands.values()) == ["unstructured 30 %", "unstructured 50 %", "16:32"]
    assert len(table.rows) == 7
    page = (tmp_path / "study" / "report.html").read_text(encoding="utf-8")
    claims = report.table("claims")
    assert claims is not None
    assert all(row[1].shown != "not measured" for row in claims.rows)
    assert not any("SparseGPT" in row[0].shown or "α" in row[0].shown for row in claims.rows)
    shown = re.sub(r"<script.*?</script>|<svg.*?</svg>|<style.*?</style>", "", page, flags=re.DOTALL)
    for each in FOOTNOTES:
        assert html.unescape(shown).count(each) <= 1, each


@pytest.mark.usefixtures("small_patterns")
def test_the_conclusion_says_what_to_use_what_it_costs_and_what_is_noise() -> None:
    lead = plain(build_report(contents(own_study())).lead)
    assert lead.startswith("Lowest perplexity: Thanos at unstructured 30 % (")
    assert " s), unstructured 50 % (" in lead
    assert "), 16:32 (" in lead
    assert "; the dense model has 21.97." in lead
    assert lead.endswith("each row has only one seed.")
    assert lead.count(". ") == 1  # two sentences
    several = plain(build_report(contents(own_study(seeds=3))).lead)
    assert "larger than the noise at unstructured 30 %, unstructured 50 % and 16:32." in several
    assert several.endswith("Noise: the larger of the two rows' standard deviations over calibration seeds.")
    near = [
        record(cell(m, seed=s), perplexity=44 + s + (m == "wanda") / 9) for m in ("thanos", "wanda") for s in (0, 1)
    ]
    assert "within the noise at unstructured 50 % (Wanda)." in plain(build_report(contents(near)).lead)
    alone = plain(build_report(contents([record(cell())])).lead)
    assert "No other row of equal sparsity was measured" in alone


def test_the_conclusion_about_a_model_that_was_not_evaluated_is_about_time() -> None:
    records = cost_study("other")
    own = {one.cell["pattern"]: one.seconds for one in records if one.cell["method"] == "magnitude"}
    assert all(
        one.seconds is None or one.seconds > own[one.cell["pattern"]]
        for one in records
        if one.cell["method"] != "magnitude"
    )
    report = build_report(contents(records))
    assert plain(report.lead) == (
        "Shortest pruning time (the model was not evaluated): Magnitude at "
        + ", ".join(
            f"{label} ({own[pattern]:.2f} s)"
            for label, pattern in (
                ("unstructured 50 %", "unstructured"),
                ("2:4", "2:4"),
                ("4:8", "4:8"),
                ("columns 50 %", "columns"),
            )
        )
        + ". It is unknown whether the differences to the next best row exceed the spread over calibration seeds: each "
        "row has only one seed."
    )
    assert [section.name for section in report.chapters[0].sections if not section.folded] == ["cost"]
    both = plain(build_report(contents([*records, *full_study(blocks=1)])).lead)
    assert "Shortest" not in both  # the evaluated model is what the report is about
    alone = [one for one in records if one.cell["block_size"] == 2048][:1]
    assert plain(build_report(contents(alone)).lead).endswith(
        "1 cell without a perplexity. It shows the cost of pruning."
    )


def test_missing_cells_are_listed_once_at_the_end(study_report: Path, tmp_path: Path) -> None:
    report = build_report(contents([one for one in full_study(blocks=1) if one.cell["method"] != "sparsegpt"]))
    last = report.chapters[-1].sections[-1]
    assert last.name == "data"
    assert any(line.startswith("Summary: unstructured 50 %: SparseGPT") for line in last.missing)


def test_a_study_of_two_methods_speaks_of_nothing_else() -> None:
    """No outlier rows, no marginal cost of a method that did not run, no list of what the paper has and the study has not."""
    found = [record(cell("dense", None))]
    found += [record(cell(m, sparsity=s, seed=n)) for m in ("sparsegpt", "wanda") for s in (0.5, 0.6) for n in (0, 1)]
    report = build_report(contents(found))
    sections = [section for chapter in report.chapters for section in chapter.sections]
    assert [section.name for section in sections] == [
        "summary", "fairness", "cost", "sparsity", "zero_shot", "noise", "data"
    ]  # fmt: skip
    assert not any(section.missing for section in sections if section.name == "data")
    words = [plain(prose) for section in sections for prose in section.prose]
    words += [plain(one.note) for one in (*report.tables, *report.figures)]
    words += [one.title for one in (*sections, *report.tables, *report.figures)]
    words += [head.head for one in report.tables for head in one.columns]
    for word in ("α", "Thanos", "marginal", "more than SparseGPT", "per point", "far above"):
        assert not any(word in text for text in words), word
    whole = build_report(contents(full_study(blocks=1)))
    heads = {head.head for one in whole.tables for head in one.columns}
    assert {"α", "s per point of perplexity"} <= heads


def test_a_method_of_another_version_is_shown(tmp_path: Path) -> None:
    new = record(cell("wanda")).cell | {"method": "alps"}
    dense = record(cell("dense", None))
    odd = record(cell("wanda"), key="f" * 64)
    odd.cell.update(new)
    report = write_report(write_store(tmp_path / "study", [record(cell()), odd, dense]))
    table = report.table("summary")
    assert table is not None
    assert [row[0].shown for row in table.rows] == ["Dense", "Thanos", "alps"]


# The command


def test_the_command_writes_the_report_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the extra report is not installed")
    folder = write_store(tmp_path / "study", [record(cell()), record(cell("wanda"))])
    assert run(["report", str(folder), "--quiet"]) == 0
    assert (folder / "report.html").is_file()
    assert str(folder / "report.html") in capsys.readouterr().out


def test_without_matplotlib_the_line_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = write_store(tmp_path / "study", [record(cell()), record(cell("wanda"))])
    assert run(["report", str(folder), "--quiet"]) == 2
    assert "pip install 'matplotlib>=3.10'" in capsys.readouterr().err


def test_a_folder_without_a_store_is_a_users_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", str(tmp_path)]) == 2
    assert "store.jsonl" in capsys.readouterr().err
    (tmp_path / "store.jsonl").write_text("")
    assert run(["report", str(tmp_path)]) == 2
    assert "has no record" in capsys.readouterr().err


def test_a_torn_last_line_is_left_out_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the extra report is not installed")
    folder = write_store(tmp_path / "study", [record(cell())])
    with (folder / "store.jsonl").open("a") as file:
        file.write('{"schema": 1, "key": "ab')
    assert run(["report", str(folder), "--quiet"]) == 0
    assert "torn" in capsys.readouterr().err


# README


def test_a_readme_shows_what_the_store_says(tmp_path: Path) -> None:
    write_store(tmp_path / "docs" / "m", [r for r in full_study(blocks=1) if r.cell["method"] in ("dense", "thanos")])
    text = "before\n\n<!-- results: docs/m -->\nold numbers\n<!-- end of results -->\n\nafter\n"
    readme = tmp_path / "README.md"
    readme.write_text(text, encoding="utf-8")
    update_readme(readme, tmp_path / "docs" / "m")
    made = readme.read_text(encoding="utf-8")
    assert made.startswith("before\n\n<!-- results: docs/m -->\n")
    assert made.endswith("<!-- end of results -->\n\nafter\n")
    assert "old numbers" not in made
    assert "![Perplexity by pattern and method](docs/m/figures/summary.svg)" in made
    assert "| Dense |" in made
    assert "made by `thanos report` from `docs/m/store.jsonl`" in made
    assert with_results(made, tmp_path) == made
    assert with_results(made.replace("21.97", "20.97"), tmp_path) == made


def test_a_readme_without_a_place_is_told_which_lines_to_add(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing", encoding="utf-8")
    folder = write_store(tmp_path / "docs", [record(cell())])
    with pytest.raises(DataError, match="<!-- results: docs -->"):
        update_readme(tmp_path / "README.md", folder)


def test_models_are_named_in_the_title(study_report: Path) -> None:
    assert f"<title>Pruning {MODEL}</title>" in (study_report / "report.html").read_text(encoding="utf-8")


def test_a_model_of_which_the_cost_alone_counts_stands_beside_an_evaluated_one(tmp_path: Path) -> None:
    both = [record(cell(method, model=model)) for model in ("second", MODEL) for method in ("thanos", "wanda")]
    folder = write_store(tmp_path, [*both, *cost_study("other")])
    report = write_report(folder)
    assert [s.name for s in report.chapters[2].sections] == ["cost", "blocks"]
    table = report.table("table2")
    assert table is not None
    assert [c.head for c in table.columns] == ["Method", "second", MODEL]
    page, store = Page((folder / "report.html").read_text(encoding="utf-8")), Store(folder)
    for one in page.numbers:
        how = (one["data-how"], one["data-field"], one["data-cells"].split(), one.get("data-minus", "").split())
        assert float(one["value"]) == pytest.approx(store.expected(*how), rel=1e-12, abs=1e-15), one
    alone = write_report(write_store(tmp_path / "alone", cost_study("other")))
    assert [s.name for chapter in alone.chapters for s in chapter.sections] == ["cost", "blocks", "data"]
    assert alone.table("cost") is not None
