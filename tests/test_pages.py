"""The pages: links lead somewhere, and the commands that they show exist with their options."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from helpers import ROOT
from thanos.cli import run

PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")] + sorted(
    (ROOT / "docs").rglob("*.md")
)
PAGES = [page for page in PAGES if page.parent.name != "tables"]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}

COMMAND = re.compile(r"\bthanos (bench [a-z]+|[a-z]+)((?:[^`\n\\#|&;>]|\\\n)*)")
"""A command of this project and the words after it, over several lines where they end with a backslash."""


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head.strip().lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_to_files_and_headings(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    """Command → its options; filled by :func:`test_commands_have_the_options_that_pages_show` as it meets them."""
    return {}


@pytest.mark.parametrize("name", TEXTS)
def test_commands_have_the_options_that_pages_show(
    name: str, options: dict[str, set[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    for command, words in COMMAND.findall(TEXTS[name]):
        given = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", words))
        if not given:
            continue
        if command not in options:
            assert run([*command.split(), "--help"]) == 0, command
            options[command] = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", capsys.readouterr().out))
        assert given <= options[command], (command, given - options[command])


def test_commands_are_found_on_several_lines() -> None:
    found = COMMAND.findall(
        "    thanos bench layer --shape 2x2 \\\n        --json F.json\n\nand `thanos prune A --plan` then --x"
    )
    assert [(command, re.findall(r"--[a-z]+", words)) for command, words in found] == [
        ("bench layer", ["--shape", "--json"]),
        ("prune", ["--plan"]),
    ]


@pytest.mark.parametrize("name", TEXTS)
def test_scripts_and_targets_of_make_exist(name: str) -> None:
    for script in re.findall(r"python (?:-m pytest )?((?:benchmarks|tests|studies)/[\w/.]+)", TEXTS[name]):
        assert (ROOT / script).exists(), script
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for target in re.findall(r"(?:^ {4}|`)make ([a-z-]+)", TEXTS[name], re.M):
        assert target in targets, target
