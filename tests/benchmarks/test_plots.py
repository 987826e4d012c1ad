"""The benchmark figures show what was measured: values, block sizes, and nothing where there is nothing."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET

import pytest

from helpers import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def plots(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import plots

    yield plots
    sys.modules.pop("plots", None)


def result(columns, block_size, seconds, *, pattern="unstructured", implementation="thanos"):
    return {
        "implementation": implementation,
        "method": "thanos",
        "pattern": pattern,
        "columns": columns,
        "block_size": block_size,
        "seconds": seconds,
        "floor_seconds": seconds / 4,
        "peak_bytes": columns * 2**20,
    }


def test_lines_over_widths_are_those_of_the_methods_own_block_size(plots):
    results = [result(256, 128, 1.0), result(512, 128, 3.0), result(512, 128, 5.0), result(512, 64, 9.0)]
    results += [result(width, 512, 7.0, pattern="2:4") for width in (256, 512)]
    lines = plots.against_width(results, lambda r: r["seconds"])
    assert lines == {
        "Thanos, unstructured, B = 128": [(256, 1.0), (512, 4.0)],
        "Thanos, 2:4, B = 512": [(256, 7.0), (512, 7.0)],
    }


def test_lines_over_block_sizes_are_those_of_the_widest_layer(plots):
    results = [result(256, 64, 1.0), result(512, 64, 2.0), result(512, 128, 3.0)]
    assert plots.against_block(results, lambda r: r["seconds"]) == {"Thanos, unstructured": [(64, 2.0), (128, 3.0)]}


def test_a_file_becomes_figures_that_say_where_it_comes_from(plots, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    machine = {"device": "x86_64", "threads": 1, "versions": {"torch": "2.13.0"}, "commit": "abc", "date": "2026-11-24"}
    results = [result(width, 128, width / 100) for width in (256, 512)]
    file = tmp_path / "layer.json"
    file.write_text(json.dumps({"benchmark": "layer", "machine": machine, "results": results}))
    monkeypatch.setattr(sys, "argv", ["plots.py", str(tmp_path / "out"), str(file), "--note", "two others ran"])
    assert plots.main() == 0
    drawn = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert sorted(drawn) == ["floor.svg", "peak.svg", "time-width.svg"]  # one block size: no line over them
    assert all("commit abc" in text and "two others ran" in text for text in drawn.values())


def test_references_and_patterns_have_dashes_of_their_own(plots):
    kinds = [(pattern, whose) for pattern in ("unstructured", "2:4") for whose in ("thanos", "reference")]
    results = [
        result(columns, 128 if pattern == "unstructured" else 512, 1.0, pattern=pattern, implementation=whose)
        for pattern, whose in kinds
        for columns in (256, 512)
    ]
    series = plots.chart("time-width", results, "x86_64").series
    assert [each.label for each in series] == [
        "Thanos, unstructured, B = 128",
        "Thanos, unstructured, reference, B = 128",
        "Thanos, 2:4, B = 512",
        "Thanos, 2:4, reference, B = 512",
    ]
    assert {each.style for each in series} == {"thanos"}
    assert len({each.variant for each in series}) == 4


def test_the_figures_of_the_page_of_speed_show_its_measurements(plots):
    """The values are compared with the file; the rest with today's figures, which have the style of a study's report."""
    folder = ROOT / "docs" / "results" / "speed" / "h200"
    results, about = plots.load([folder / "scaling.json"])
    measured = {(r["method"], r["pattern"], r["columns"], r["block_size"]): r for r in results}
    command = (
        "python benchmarks/plots.py docs/results/speed/h200 docs/results/speed/h200/scaling.json --note '4096 rows'"
    )
    shown = {}
    for name in plots.FIGURES:
        text = (folder / f"{name}.svg").read_text(encoding="utf-8")
        description = ET.fromstring(text).find(".//{http://purl.org/dc/elements/1.1/}description")
        assert description is not None
        shown[name] = json.loads(description.text or "")
        assert shown[name] == plots.chart(name, results, about, "4096 rows").to_dict(), f"run: {command}"
        assert "prefers-color-scheme: dark" in text
    for name, field in (("time-width", "seconds"), ("peak", "peak_bytes")):
        lines = {each["label"]: each["points"] for each in shown[name]["series"]}
        for columns, point in zip((1024, 2048, 4096, 8192, 12288), lines["Thanos, 2:4, B = 512"], strict=True):
            assert point["x"]["value"] == columns
            assert point["y"]["value"] == measured["thanos", "2:4", columns, 512][field]
    last = shown["floor"]["series"][0]["points"][-1]["y"]["value"]
    widest = measured["thanos", "unstructured", 12288, 128]
    assert last == pytest.approx(widest["floor_seconds"] / widest["seconds"])


def test_another_benchmarks_file_is_refused(plots, tmp_path):
    file = tmp_path / "guard.json"
    file.write_text(json.dumps({"benchmark": "guard"}))
    with pytest.raises(SystemExit, match=r"guard\.json is no result of thanos bench layer"):
        plots.load([file])


def test_exponents_are_the_slopes_of_power_laws(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import exponents

    columns = (256, 512, 1024, 2048, 4096)
    results = [result(b, 64, 1e-9 * b**2.5) | {"modelled_seconds": 1e-9 * b**3} for b in columns]
    results += [result(b, 128, 0.01 * b) | {"modelled_seconds": 0.01 * b} for b in columns]
    results += [result(b, 64, 1.0, implementation="reference") | {"modelled_seconds": None} for b in columns]
    lines = exponents.table(results).splitlines()
    assert lines[0].endswith("| B = 64 | B = 128 |")
    assert lines[2:] == ["| thanos, unstructured | 2.50 (3.00), 2.50 | 1.00 (1.00), 1.00 |"]
    sys.modules.pop("exponents", None)
