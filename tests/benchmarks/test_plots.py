"""The benchmark figures show what was measured: values, block sizes, and nothing where there is nothing."""

from __future__ import annotations

import json
import sys

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
        "thanos unstructured, B = 128": [(256, 1.0), (512, 4.0)],
        "thanos 2:4, B = 512": [(256, 7.0), (512, 7.0)],
    }


def test_lines_over_block_sizes_are_those_of_the_widest_layer(plots):
    results = [result(256, 64, 1.0), result(512, 64, 2.0), result(512, 128, 3.0)]
    assert plots.against_block(results, lambda r: r["seconds"]) == {"thanos unstructured": [(64, 2.0), (128, 3.0)]}


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
