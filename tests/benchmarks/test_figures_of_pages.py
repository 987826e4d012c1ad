"""The figure of the repair and the table of docs/scale-out.md show what the result files say."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from types import ModuleType

import pytest

from helpers import ROOT

RESULTS = ROOT / "docs" / "results"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """A function that imports a script of benchmarks/ by name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)

    def load(name: str) -> ModuleType:
        return __import__(name)

    yield load
    for name in {"repair_figure", "repair_page", "projection"} - before:
        sys.modules.pop(name, None)


def test_the_figure_shows_the_lines_of_the_repair(script) -> None:
    figure = script("repair_figure")
    chart = figure.chart(figure.read(RESULTS / "repair" / figure.LINES))
    root = ET.fromstring((RESULTS / "repair" / figure.FIGURE).read_text(encoding="utf-8"))
    description = root.find(".//{http://purl.org/dc/elements/1.1/}description")
    assert description is not None
    assert json.loads(description.text or "") == chart.to_dict(), (
        "run: python benchmarks/repair_figure.py docs/results/repair"
    )
    values = {json.loads(line)["name"]: json.loads(line) for line in (RESULTS / "repair" / figure.LINES).open()}
    shown = {point.y.cells[0]: (point.y.value, point.label) for series in chart.series for point in series.points}
    assert len(shown) == sum(len(names) for names in figure.GROUPS.values())
    for name, (perplexity, label) in shown.items():
        assert perplexity == values[name]["perplexity"]
        assert label.endswith(f", {values[name]['seconds']:.0f} s")


def test_the_table_of_projections_is_what_the_rates_give(script) -> None:
    projection = script("projection")
    page = (ROOT / "docs" / "scale-out.md").read_text(encoding="utf-8")
    assert projection.filled(page, RESULTS) == page, "run: python benchmarks/projection.py docs/scale-out.md"


def test_the_projection_of_the_measured_model_is_what_was_measured(script) -> None:
    """Llama-3-8B's shape: the sum of the parts against the median block of the run from which only some rates come."""
    projection = script("projection")
    known = projection.Measured.of(RESULTS)
    parts = projection.block(projection.SHAPES_TO_PROJECT["8B"], 1, known)
    run = json.loads((RESULTS / "speed" / "h200" / "model-thanos.json").read_text(encoding="utf-8"))
    median = sorted(run["block_seconds"])[len(run["block_seconds"]) // 2]
    assert sum(parts.values()) == pytest.approx(median, rel=0.1)


def test_parts_that_are_divided_shrink_and_the_factors_do_not(script) -> None:
    projection = script("projection")
    known = projection.Measured.of(RESULTS)
    shape = projection.SHAPES_TO_PROJECT["70B"]
    one, eight = (projection.block(shape, gpus, known) for gpus in (1, 8))
    for part in ("statistics", "propagate", "solve"):
        assert eight[part] == pytest.approx(one[part] / 8)
    assert eight["factors"] == one["factors"]
    assert one["all-reduce"] == one["gather"] == one["small sums"] == 0
    # Two times 7/8 of the bytes of four float32 matrices, three of 8192 and one of 28,672 columns, at 355 GB/s.
    assert eight["all-reduce"] == pytest.approx(2 * 7 / 8 * 4 * (3 * 8192**2 + 28672**2) / 355e9)


def test_operations_of_a_block_are_those_of_its_products(script) -> None:
    projection = script("projection")
    shape = projection.SMOLLM2
    assert projection.weights(shape) == 2 * 576 * 576 + 2 * 192 * 576 + 3 * 576 * 1536
    attention = 2 * 2048**2 * 576  # QKᵀ and PV of 2048 tokens, half of each masked
    assert projection.forward(shape) == 2 * 2048 * projection.weights(shape) + attention
