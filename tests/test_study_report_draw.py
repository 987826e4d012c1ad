"""Figures: the same data gives the same bytes, and the SVG carries it."""

from __future__ import annotations

import itertools
import json
import random
import xml.etree.ElementTree as ET

import pytest

from thanos.study.report.charts import Chart, HeatMap, Point, Series, pareto
from thanos.study.report.labels import distance, place_label, spread_apart
from thanos.study.report.theme import DARK, STYLES
from thanos.study.report.values import Number

pytest.importorskip("matplotlib", reason="the extra report is not installed")


def number(value: float, field: str = "perplexity") -> Number:
    return Number(value, field, "mean", ("abc",))


def chart(kind: str, values: list[float], **changes: object) -> Chart:
    points = tuple(
        Point(number(i + 1, "seconds"), number(v), number(v / 50), f"p{i}", i == 1) for i, v in enumerate(values)
    )
    series = (Series("Thanos", "thanos", points), Series("Other", "other", points[::-1]))
    return Chart(kind, f"demo_{kind}", f"A {kind} chart", "x", "y", series, ("dense", number(21.97)), **changes)  # type: ignore[arg-type]


HEAT = HeatMap(
    "heat", "Heat", "relative error", ("q", "k"), ("0", "1"), ((number(0.1), None), (number(0.2), number(3.0)))
)
FIGURES = [chart(kind, [44.0, 47.0, 62.0]) for kind in ("lines", "scatter", "dots")] + [HEAT]


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_the_same_figure_gives_the_same_bytes_and_carries_its_data(figure: Chart | HeatMap) -> None:
    from thanos.study.report.draw import draw

    svg, png = draw(figure)
    assert (svg, png) == draw(figure)
    assert png.startswith(b"\x89PNG")
    description = ET.fromstring(svg).find(".//{http://purl.org/dc/elements/1.1/}description")
    assert description is not None
    assert description.text is not None
    assert json.loads(description.text) == figure.to_dict()
    assert "prefers-color-scheme: dark" in svg
    assert "<dc:date>" not in svg


def test_an_svg_refers_to_nothing_outside_itself() -> None:
    from thanos.study.report.draw import draw

    svg, _ = draw(FIGURES[0])
    root = ET.fromstring(svg)
    links = [value for element in root.iter() for name, value in element.attrib.items() if name.endswith("href")]
    assert all(link.startswith("#") for link in links)
    assert "url(http" not in svg


def test_wide_ranges_are_logarithmic_and_narrow_ones_are_not() -> None:
    assert chart("lines", [44.0, 500.0]).scale("y") == "log"
    assert chart("lines", [44.0, 60.0]).scale("y") == "linear"
    assert HEAT.scale() == "log"


def test_a_far_point_of_a_scatter_hides_no_other() -> None:
    far = chart("scatter", [44.0, 47.0, 62.0, 102811.0])
    assert far.ceiling is not None
    assert far.scale("y") == "linear"
    assert far.to_dict()["series"][0]["points"][3]["y"]["value"] == 102811.0  # the data is what it is
    assert chart("scatter", [44.0, 47.0, 62.0]).ceiling is None


def test_the_pareto_front_against_brute_force() -> None:
    draw = random.Random(3)
    for _ in range(50):
        points = [(draw.randint(0, 6), draw.randint(0, 6)) for _ in range(8)]
        expected = [not any((c <= a and d <= b) and (c, d) != (a, b) for c, d in points) for a, b in points]
        assert pareto([(float(a), float(b)) for a, b in points]) == expected


def test_labels_are_pushed_apart_in_order_and_below_the_top() -> None:
    draw = random.Random(4)
    for _ in range(50):
        wanted = [draw.uniform(0, 100) for _ in range(6)]
        placed = spread_apart(wanted, 11.0, 100.0)
        order = sorted(range(6), key=lambda i: wanted[i])
        heights = [placed[i] for i in order]
        assert all(b - a >= 11.0 - 1e-9 for a, b in itertools.pairwise(heights))
        assert max(placed) <= 100.0


def test_a_label_is_nearest_to_its_own_point_where_there_is_room() -> None:
    place, other = (100.0, 100.0), (100.0, 112.0)
    box = place_label(place, 60.0, [(95.0, 107.0, 105.0, 117.0)], [other], (0.0, 0.0, 300.0, 300.0))
    assert distance(box, place) < distance(box, other)
    assert distance(box, place) > 0


def test_every_colour_has_a_dark_twin_and_enough_contrast() -> None:
    for color, _ in STYLES.values():
        assert _contrast(color, "#ffffff") >= 3.0
        assert _contrast(DARK[color], DARK["#ffffff"]) >= 4.5
    for ink in ("#1f2328", "#5f6872"):
        assert _contrast(ink, "#ffffff") >= 4.5
        assert _contrast(DARK[ink], DARK["#ffffff"]) >= 4.5


def _contrast(first: str, second: str) -> float:
    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)
