"""Figures: the same data gives the same bytes, and the SVG carries it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import xml.etree.ElementTree as ET

import pytest

from thanos.study.report.figures.axes import look_of
from thanos.study.report.figures.charts import Chart, HeatMap, Point, Series
from thanos.study.report.figures.theme import DARK, PAPER, STYLES
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
    light, dark = svg.split("@media (prefers-color-scheme: dark)")
    assert f"svg{{background:{PAPER}}}" in light  # the page around it may have the other theme
    assert f"svg{{background:{DARK[PAPER]}}}" in dark
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


def crowded() -> list[Chart]:
    """Charts whose points, spreads and names have little room: equal values, far points, long names, several variants."""
    values = [[44.0, 47.0, 62.0, 90.0], [44.1, 47.2, 63.0, 80.0], [44.2, 47.1, 5e4, 3e7], [44.0, 700.0, 6e4, 1e8]]
    styles = ("thanos", "thanos", "wanda", "magnitude")
    points = [
        tuple(
            Point(number(10 * i + 10 + 0.1 * (k % 2), "seconds"), number(v), number(v / 20), f"p{i}")
            for i, v in enumerate(own)
        )
        for k, own in enumerate(values)
    ]
    lines = tuple(
        Series(f"{style} with a long name {i}", style, own, i)
        for i, (style, own) in enumerate(zip(styles, points, strict=True))
    )
    alone = [
        Series(f"{style}, α = 0.{i}", style, (Point(number(3.0 + i, "seconds"), number(v), number(2.0), marked=i < 3),))
        for i, (style, v) in enumerate(zip(styles, (44.0, 44.1, 60.0, 1e7), strict=True))
    ]
    reference = ("dense", number(21.97))
    return [
        Chart("lines", "lines", "Lines", "x", "y", lines, reference, capped=True),
        Chart("lines", "log2", "Lines over sizes", "x", "y", lines[::2], reference, x_scale="log2"),
        Chart("scatter", "scatter", "A scatter", "x", "y", tuple(alone)),
        Chart("dots", "dots", "Dots", "", "y", lines, reference),
    ]


@pytest.mark.parametrize("figure", crowded(), ids=lambda figure: figure.name)
def test_nothing_covers_anything_else(figure: Chart) -> None:
    from thanos.study.report.figures.draw import drawn

    with drawn(figure) as canvas:
        axes, renderer, unit = canvas.axes[0], canvas.canvas.get_renderer(), canvas.dpi / 72
        assert canvas.legends
        legend = canvas.legends[0].get_window_extent(renderer)
        axis = [axes.xaxis, axes.yaxis, *(child.yaxis for child in axes.child_axes)]
        ticks = [label for each in axis for tick in each._update_ticks() for label in (tick.label1, tick.label2)]
        words = [*ticks, axes.xaxis.label, axes.title, axes._left_title, *axes.texts, *canvas.texts]
        texts = [text.get_window_extent(renderer) for text in words if text.get_visible() and text.get_text()]
        assert len(texts) > 8
        marks, bars = [], []
        for line in axes.lines:
            locations = line.get_transform().transform(line.get_xydata())
            if (
                line.get_marker() in ("o", "s", "^", "D", "v", "P", "X") and line.get_markersize() < 9
            ):  # rings go around markers
                size = line.get_markersize() * (2**0.5 if line.get_marker() == "D" else 1)
                marks += [(tuple(place), size * unit / 2) for place in locations]
        for group in axes.collections:  # the error bars
            bars += [group.get_transform().transform_path(path).get_extents() for path in group.get_paths()]
        page = canvas.bbox
        assert all(box.x0 >= -1 and box.x1 <= page.x1 + 1 and box.y0 >= -1 and box.y1 <= page.y1 + 1 for box in texts)
        assert legend.x0 >= -1
        assert legend.x1 <= page.x1 + 1
        assert legend.y1 <= axes.bbox.y0
        assert not any(legend.overlaps(box) for box in texts)
        assert not any(first.overlaps(second) for first, second in itertools.combinations(texts, 2))
        assert not any(box.overlaps(bar) for box in texts for bar in bars)
        for (x, y), half in marks:
            assert not any(b.x0 - half < x < b.x1 + half and b.y0 - half < y < b.y1 + half for b in [*texts, legend])
        assert len(marks) == sum(len(series.points) for series in figure.series)
        for ((x, y), half), ((to_x, to_y), other) in itertools.combinations(marks, 2):
            assert max(abs(x - to_x), abs(y - to_y)) >= half + other - 0.5, "one marker lies over another"


def test_no_bar_of_a_scatter_goes_through_another_marker() -> None:
    """Sparse weights take the same bytes whatever made them, so their points lie above one another."""
    from thanos.study.report.figures.draw import drawn

    values = (46.9, 46.4, 48.4, 43.0, 51.0)
    points = [Point(number(269.0, "seconds"), number(value), number(0.6), "p") for value in values]
    series = tuple(Series(f"s{i}", "thanos", (point,), i) for i, point in enumerate(points))
    far = Series("far", "wanda", (Point(number(120.0, "seconds"), number(49.0), number(0.6)),))
    with drawn(Chart("scatter", "bars", "Bars", "x", "y", (*series, far), directed=True)) as canvas:
        axes, unit = canvas.axes[0], canvas.dpi / 72
        marks, bars = [], []
        for line in axes.lines:
            (x, *_), ys = line.get_transform().transform(line.get_xydata()).T
            if line.get_marker() == "_" and len(ys) == 2:
                bars.append((x, min(ys), max(ys)))
            elif line.get_marker() in ("o", "^"):
                marks.append((x, ys[0]))
        for group in axes.collections:
            boxes = [group.get_transform().transform_path(path).get_extents() for path in group.get_paths()]
            bars += [(box.x0, box.y0, box.y1) for box in boxes]
        assert len(marks) == len(bars) == 6
        for x, y in marks:
            assert sum(abs(x - at) < 3 * unit and low - 2 * unit < y < high + 2 * unit for at, low, high in bars) == 1


def test_markers_that_make_room_for_each_other_stay_near_and_inside_the_axes() -> None:
    """Equal models have nearly equal speeds, at the right end of the axis."""
    from thanos.study.report.figures.draw import drawn

    points = [Point(number(269.0, "seconds"), number(47.0), number(0.6), "p") for _ in range(5)]
    series = tuple(Series(f"s{i}", "thanos", (point,), i) for i, point in enumerate(points))
    far = Series("far", "wanda", (Point(number(120.0, "seconds"), number(49.0), number(0.6)),))
    with drawn(Chart("scatter", "ends", "Ends", "x", "y", (far, *series), directed=True)) as canvas:
        axes, unit = canvas.axes[0], canvas.dpi / 72
        ends = [
            line.get_transform().transform(line.get_xydata())[0, 0] for line in axes.lines if line.get_marker() == "o"
        ]
        true = axes.transData.transform((269.0, 47.0))[0]
        assert len(ends) == 5
        assert max(abs(x - true) for x in ends) < 13 * unit  # two on each side, 6 points apart
        assert max(ends) < axes.bbox.x1


def test_a_legend_names_every_series_and_the_numbers_above_the_axes() -> None:
    from thanos.study.report.figures.draw import drawn

    with drawn(crowded()[0]) as canvas:
        words = [text.get_text().replace("\n", " ").replace("\u00a0", " ") for text in canvas.legends[0].get_texts()]
    assert words == [
        "thanos with a long name 0",
        "thanos with a long name 1",
        "wanda with a long name 2 ↑ 50,000, 3.00 × 10⁷",
        "magnitude with a long name 3 ↑ 700.00, 60,000, 1.00 × 10⁸",
        "dense 21.97",
    ]


def test_models_of_one_kind_differ_in_more_than_the_fill_of_a_small_marker() -> None:
    looks = [look_of("sparse", [], variant) for variant in range(12)]
    assert len({(look["marker"], look["fillstyle"]) for look in looks}) == 12
    assert {look["fillstyle"] for look in looks[:6]} == {"full", "none"}
    assert [look_of("thanos", [], variant)["fillstyle"] for variant in range(3)] == ["full", "none", "bottom"]


def test_one_line_needs_no_legend() -> None:
    from thanos.study.report.figures.draw import drawn

    one = crowded()[0]
    with drawn(dataclasses.replace(one, series=one.series[:1], reference=None)) as canvas:
        assert not canvas.legends


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
