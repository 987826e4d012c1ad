"""The page in Debian's Chromium: wide, on a phone, light and dark."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from thanos.comparison.document import Comparison, Row
from thanos.comparison.report import PAGE, write_report
from thanos.study.report.figures.theme import DARK

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

if CHROMIUM is None or DRIVER is None:
    pytest.skip(
        "no chromium with its driver; on Debian: apt-get install chromium chromium-driver", allow_module_level=True
    )
pytest.importorskip("selenium", reason="selenium is not installed")
Image = pytest.importorskip("PIL.Image", reason="pillow, which matplotlib brings, is not installed")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


def show(browser: Any, folder: Path, width: int, theme: str, page: str = "report.html") -> Any:
    """Open the page anew at a width and in a theme."""
    metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    feature = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
    browser.get((folder / page).as_uri())
    return browser


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390, 320])
def test_the_page_fits_and_no_column_is_cut_off(browser: Any, study_report: Path, width: int, theme: str) -> None:
    show(browser, study_report, width, theme)
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    page, window = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert page <= window
    outside = browser.execute_script(
        """return [...document.querySelectorAll('main *')].filter(e => !e.closest('.box') && !e.closest('svg')
           && e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80))"""
    )
    assert outside == []
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('.box')].map(e => getComputedStyle(e).overflowX)"
    )
    assert boxes
    assert set(boxes) == {"auto" if width > 640 else "visible"}
    # On a phone every number of a row can be read without scrolling, below its column's heading.
    hidden = browser.execute_script(
        """return [...document.querySelectorAll('td')].filter(e => e.textContent && innerWidth < 640
           && (e.getBoundingClientRect().right > innerWidth || e.scrollWidth > e.clientWidth + 1)).length"""
    )
    assert hidden == 0
    bare = browser.execute_script(
        """return [...document.querySelectorAll('td')].filter(e => e.textContent && innerWidth < 640
           && !e.matches('td.text:first-child') && e.getClientRects().length
           && ['none', '""'].includes(getComputedStyle(e, '::before').content)).map(e => e.outerHTML.slice(0, 80))"""
    )
    assert bare == []
    heads = browser.execute_script(
        """return [...document.querySelectorAll('#table-summary tbody tr:not(.band) td:nth-child(4)')]
           .map(e => getComputedStyle(e, '::before').content)"""
    )
    assert set(heads) == {"none" if width > 640 else '"perplexity"'}


def test_nothing_is_fetched_and_nothing_complains(browser: Any, study_report: Path) -> None:
    show(browser, study_report, 1280, "light")
    assert browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_of_page_and_figures_can_be_read_in_both_themes(
    browser: Any, study_report: Path, width: int, theme: str
) -> None:
    show(browser, study_report, width, theme)
    faint = browser.execute_script(
        """
        const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126*r + 0.7152*g + 0.0722*b; };
        const paper = light(getComputedStyle(document.body).backgroundColor);
        const contrast = c => { const l = light(c); return (Math.max(l, paper) + .05) / (Math.min(l, paper) + .05); };
        const words = [...document.querySelectorAll('p, td, th, li, h1, h3')].map(e => getComputedStyle(e).color);
        const labels = [...document.querySelectorAll('figure svg text')].map(e => getComputedStyle(e).fill);
        return [...words, ...labels].filter(c => contrast(c) < 4).length + (labels.length < 100 ? 1000 : 0);
        """
    )
    assert faint == 0


def test_figures_are_as_wide_as_a_phone_and_their_text_is_legible(browser: Any, study_report: Path) -> None:
    show(browser, study_report, 390, "light")
    widths = browser.execute_script(
        "return [...document.querySelectorAll('figure svg')].map(e => e.getBoundingClientRect().width)"
    )
    assert len(widths) > 20
    assert all(300 < width <= 390 for width in widths)
    heights = browser.execute_script(
        "return [...document.querySelectorAll('figure svg text')].map(e => e.getBoundingClientRect().height)"
    )
    assert min(heights) >= 8


def test_a_reader_finds_every_section_and_number(browser: Any, study_report: Path) -> None:
    show(browser, study_report, 1280, "light")
    closed = browser.execute_script(
        """return [...document.querySelectorAll('details.section')].map(d => [d.open, d.querySelector('summary').innerText,
           d.querySelector('section').textContent.trim().length])"""
    )
    assert len(closed) > 10
    assert all(not opened and title and length > 100 for opened, title, length in closed)
    shown = browser.execute_script("return [...document.querySelectorAll('main > section')].map(s => s.id)")
    assert shown == ["summary"]
    shown = browser.execute_script(
        "return [...document.querySelectorAll('data')].filter(e => !(Math.abs(Number(e.value)) >= 0)).length"
    )
    assert shown == 0


def test_figures_have_no_colour_of_the_light_theme_in_the_dark_one(browser: Any, study_report: Path) -> None:
    show(browser, study_report, 1280, "dark")
    light = {tuple(bytes.fromhex(color[1:])) for color in DARK}
    for name in ("cost_unstructured_seconds", "sparsity_columns"):
        script = """const r = document.querySelector(arguments[0]).getBoundingClientRect();
            return {x: r.x + scrollX, y: r.y + scrollY, width: r.width, height: r.height, scale: 3}"""
        clip = browser.execute_script(script, f"#figure-{name} svg")
        shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        pixels = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB").getcolors(2**24)
        assert len(pixels) > 10
        assert {color for _, color in pixels} & light == set()


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a comparison with long names, long notes and every column."""
    names = ("", " int8", "-16-32-recovered-packed", "-shrunk-20-recovered int4")
    note = "quantised by torchao 0.18.0, HQQ, groups of 128; the head, tied to the embedding, stays dense"
    rows = [
        Row(
            label=f"Qwen2.5-Coder-1.5B{name}",
            kind=kind,
            disk_bytes=3_087_000_000,
            weight_bytes=3_087_000_000,
            tokens_per_second=190.0 + place,
            first_token_seconds=1.234,
            evaluation={"perplexity": 113.9 + place, "kl_divergence": 0.1, "top1_agreement": 0.9},
            zero_shot={"average": {"acc": 0.55, "acc_stderr": 0.006}},
            texts={"def add(a, b):": "    return a + b\n" * 3},
            notes=[note],
        )
        for place, (name, kind) in enumerate(zip(names, ("dense", "int8", "packed", "int4"), strict=True))
    ]
    settings = {"dtype": "bfloat16", "text": "t", "windows": 4, "sequence_length": 2048, "context": 128}
    settings |= {"compiled": False, "tasks": ["piqa"], "limit": None}
    machine = {"device": "cpu", "versions": {}, "date": "2026-01-01", "commit": "", "threads": 1}
    folder = tmp_path_factory.mktemp("comparison")
    write_report([Comparison(command="", machine=machine, settings=settings, rows=rows)], folder)
    return folder


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_comparison_fits(browser: Any, comparison: Path, width: int, theme: str) -> None:
    show(browser, comparison, width, theme, PAGE)
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    page, window = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert page <= window
    hidden = browser.execute_script(
        "return [...document.querySelectorAll('.box')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
    )
    assert hidden == 0
    assert browser.get_log("browser") == []
