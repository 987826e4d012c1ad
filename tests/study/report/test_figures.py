"""Figures: the same data gives the same bytes, and the SVG carries it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import xml.etree.ElementTree as ET

import pytest

from thanos.study.report.figures.charts import Chart, HeatMap, Point, Series
from thanos.study.report.figures.labels import (
    Box,
    Segment,
    crosses,
    distance,
    leader_of,
    needs_leader,
    place_label,
    spread_apart,
)
from thanos.study.report.figures.theme import DARK, STYLES
from thanos.study.report.numbers import Number

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
    from thanos.study.report.figures.draw import draw

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
    from thanos.study.report.figures.draw import draw

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


def test_lines_are_capped_where_asked_and_three_are_drawn() -> None:
    low, high = chart("lines", [44.0, 400.0, 500.0]).series[0], chart("lines", [44.0, 400.0, 9e7]).series[0]
    three = dataclasses.replace(chart("lines", [1.0]), series=(low, low, high), capped=True)
    assert three.ceiling == 800.0
    assert three.scale("y") == "log"
    assert dataclasses.replace(three, capped=False).ceiling is None
    assert dataclasses.replace(three, series=(low, high)).ceiling is None
    assert dataclasses.replace(three, series=(low, low, low)).ceiling is None


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


def test_a_line_crosses_the_boxes_that_it_passes_through() -> None:
    box = (10.0, 10.0, 20.0, 20.0)
    assert crosses(((0.0, 15.0), (30.0, 15.0)), box)
    assert crosses(((0.0, 0.0), (30.0, 30.0)), box)
    assert crosses(((15.0, 15.0), (40.0, 15.0)), box)
    assert not crosses(((0.0, 15.0), (9.0, 15.0)), box)
    assert not crosses(((0.0, 25.0), (30.0, 25.0)), box)
    assert not crosses(((0.0, 15.0), (15.0, 40.0)), box)


def test_no_label_lies_on_anothers_line_and_no_line_runs_through_a_label() -> None:
    draw, bounds = random.Random(6), (0.0, 0.0, 400.0, 200.0)
    for _ in range(200):
        places = [(draw.uniform(150, 250), draw.uniform(80, 120)) for _ in range(4)]
        marks = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
        boxes: list[Box] = []
        lines: list[Segment] = []
        for index, place in enumerate(places):
            rest = places[:index] + places[index + 1 :]
            taken = [*marks[:index], *marks[index + 1 :], *boxes]
            box = place_label(place, 50.0, taken, rest, bounds, lines)
            assert not any(crosses(line, box) for line in lines)
            if needs_leader(box, place):
                assert not any(crosses(leader_of(box, place), other) for other in boxes)
                lines.append(leader_of(box, place))
            boxes.append(box)


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
