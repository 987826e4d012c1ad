"""The JSON document of a comparison: what is read again, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from thanos.cli import run
from thanos.comparison.document import Comparison, Row, merged, read_comparisons
from thanos.comparison.report import PAGE, build_report, write_document
from thanos.errors import DataError
from thanos.study.report.page import render_page

SETTINGS: dict[str, Any] = {
    "dtype": "bfloat16",
    "text": "t.txt",
    "sequence_length": 64,
    "windows": 2,
    "context": 9,
    "compiled": False,
    "tasks": [],
    "limit": None,
}
MACHINE = {"device": "cpu", "date": "2026-01-01", "commit": None, "versions": {}, "threads": 1}


def written(folder: Path, label: str = "a") -> Path:
    rows = [Row(label=label, weight_bytes=2, evaluation={"perplexity": 3.0})]
    write_document([Comparison(command="", machine=MACHINE, settings=SETTINGS, rows=rows)], folder)
    return folder / "comparison.json"


def test_a_document_is_read_as_it_was_written(tmp_path: Path) -> None:
    (found,) = read_comparisons([written(tmp_path)])
    assert (found.settings, found.machine, found.rows[0].weight_bytes) == (SETTINGS, MACHINE, 2)


@pytest.mark.parametrize("part", ["settings", "machine"])
def test_a_run_that_lacks_a_key_of_the_page_is_refused(tmp_path: Path, part: str) -> None:
    values = json.loads(written(tmp_path).read_text())
    for key in list(values["runs"][0][part]):
        changed = json.loads(json.dumps(values))
        del changed["runs"][0][part][key]
        (tmp_path / "other.json").write_text(json.dumps(changed))
        with pytest.raises(DataError, match=f"without {part}.{key}"):
            read_comparisons([tmp_path / "other.json"])


def test_groups_of_the_same_models_have_titles_and_anchors_of_their_own() -> None:
    rows = [Row(label=name, weight_bytes=2) for name in "ab"]  # nothing to draw
    settings = [SETTINGS, {**SETTINGS, "context": 128}, {**SETTINGS, "text_sha256": "1"}, {**SETTINGS, "tasks": ["t"]}]
    runs = [Comparison(command="", machine=MACHINE, settings=each, rows=rows) for each in settings]
    runs.append(
        Comparison(command="", machine=MACHINE, settings=SETTINGS, rows=[dataclasses.replace(rows[0], label="c")])
    )
    report = build_report(runs)
    assert [chapter.title for chapter in report.chapters] == [
        "a and others: context 9, tasks none",
        "a and others: context 128, tasks none",
        "a and others: context 9, tasks none (2)",
        "a and others: context 9, tasks t",
        "c",
    ]
    page = render_page(report.title, report.lead, report.chapters, {})
    anchors = re.findall(r'<section[^>]* id="([^"]+)"', page)
    assert len(anchors) == len(set(anchors)) == sum(len(chapter.sections) for chapter in report.chapters)
    links = re.findall(r'href="#([^"]+)"', page)
    assert len(links) == len(set(links)) >= len(report.chapters)
    assert set(links) <= set(anchors)


@pytest.mark.parametrize(("runs", "words"), [([], "no runs"), ([{"rows": []}], "without rows")])
def test_a_document_without_numbers_is_refused(tmp_path: Path, runs: list[Any], words: str) -> None:
    values = json.loads(written(tmp_path).read_text())
    values["runs"] = [{**values["runs"][0], **run} for run in runs]
    (tmp_path / "other.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=words):
        read_comparisons([tmp_path / "other.json"])


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("row", "label", 5),
        ("row", "weight_bytes", "many"),
        ("row", "tokens_per_second", float("nan")),
        ("row", "evaluation", "good"),
        ("row", "evaluation", {"perplexity": float("inf")}),
        ("row", "evaluation", {"perplexity": float("nan")}),
        ("row", "zero_shot", {"average": 5}),
        ("row", "zero_shot", {}),
        ("row", "texts", None),
        ("row", "texts", {"Two and": 2}),
        ("row", "notes", "one"),
        ("settings", "tasks", None),
        ("machine", "versions", "2.13"),
    ],
)
def test_a_value_that_cannot_be_shown_is_refused(
    tmp_path: Path, part: str, name: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    values = json.loads(written(tmp_path).read_text())
    run_ = values["runs"][0]
    (run_["rows"][0] if part == "row" else run_[part])[name] = value
    (tmp_path / "other.json").write_text(json.dumps(values))
    assert run(["compare", str(tmp_path / "other.json"), "--out", str(tmp_path / "c")]) == 2
    assert "is not the JSON of a comparison" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("rows", [["dense"], [None], {"a": 1}, 3])
def test_rows_that_are_none_are_refused(tmp_path: Path, rows: Any) -> None:
    values = json.loads(written(tmp_path).read_text())
    values["runs"][0]["rows"] = rows
    (tmp_path / "other.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match="is not the JSON of a comparison"):
        read_comparisons([tmp_path / "other.json"])


def test_the_texts_of_all_runs_are_kept() -> None:
    """Two runs continue different prompts; the numbers are those of the last."""
    runs = [
        Comparison(
            command="",
            machine=MACHINE,
            settings=SETTINGS,
            rows=[Row(label="dense", weight_bytes=size, texts={prompt: "x", "both": str(size)})],
        )
        for size, prompt in ((1, "one"), (2, "two"))
    ]
    (row,) = merged(runs)
    assert row == Row(label="dense", weight_bytes=2, texts={"one": "x", "both": "2", "two": "x"})


@pytest.mark.parametrize(
    "option", [["--quantised", "int8"], ["--tasks", "piqa"], ["--compile"], ["--prompts", "p.txt"]]
)
def test_options_that_measure_are_refused_for_earlier_runs(
    tmp_path: Path, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["compare", str(written(tmp_path)), *option, "--out", str(tmp_path / "c")]) == 2
    assert "only drawn" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def current(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("matplotlib", reason="the extra report is not installed")
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    return tmp_path / "current"


@pytest.mark.parametrize("name", ["..", "../comparison.json"])
def test_the_page_of_one_document_is_made_again_beside_it(
    name: str, current: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = written(tmp_path).read_bytes()
    assert run(["compare", name, "--quiet"]) == 0
    assert files(current) == set()
    assert (tmp_path / PAGE).is_file()
    assert (tmp_path / "comparison.json").read_bytes() == before
    assert f"../{PAGE}" in capsys.readouterr().out


def test_one_page_of_several_documents_is_in_the_folder_of_a_measurement(
    current: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = written(tmp_path / "first"), written(tmp_path / "second", "b")
    for _ in range(2):  # the folder has the same measurements then
        assert run(["compare", str(first), str(second), "--quiet"]) == 0
        assert f"comparison/{PAGE}" in capsys.readouterr().out
    assert {name.split("/")[0] for name in files(current)} == {"comparison"}
    assert len(read_comparisons([current / "comparison"])) == 2
    assert files(tmp_path / "first") == files(tmp_path / "second") == {"comparison.json"}


def test_labels_that_two_runs_measured_are_said(
    current: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, size in (("first", 2), ("second", 3), ("third", 3)):
        rows = [Row(label="dense", weight_bytes=4 + size), Row(label="packed", weight_bytes=size)]
        write_document([Comparison(command="", machine=MACHINE, settings=SETTINGS, rows=rows)], tmp_path / folder)
    assert run(["compare", str(tmp_path / "second"), str(tmp_path / "third"), "--out", "same"]) == 0
    assert "several of these runs" not in capsys.readouterr().err  # the rows are equal; the dense one is in every run
    assert run(["compare", str(tmp_path / "first"), str(tmp_path / "second"), "--out", "both", "--quiet"]) == 0
    assert "several of these runs measured packed; the page shows the last" in capsys.readouterr().err


def test_drawing_replaces_no_measurements_without_out(
    current: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = written(tmp_path / "first"), written(tmp_path / "second", "b")
    kept = written(current / "comparison", "c").read_bytes()
    renamed = second.rename(tmp_path / "other.json")  # the page of a renamed document goes where no --out leads
    for given in ([first, renamed], [renamed]):
        assert run(["compare", *map(str, given), "--quiet"]) == 2
        assert capsys.readouterr().err == (
            "error: comparison/comparison.json has measurements that are in none of these files, and would be replaced; "
            "give it too, or give --out with another folder\n"
        )
        assert (current / "comparison/comparison.json").read_bytes() == kept
    assert run(["compare", "comparison", str(first), "--quiet"]) == 0
    assert [one.rows[0].label for one in read_comparisons([current / "comparison"])] == ["c", "a"]


def test_a_page_is_not_drawn_into_a_models_folder(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["compare", str(written(tmp_path)), "--out", str(tiny_llama / "c")]) == 2
    assert "is inside the folder of another model" in capsys.readouterr().err
    assert not (tiny_llama / "c").exists()
