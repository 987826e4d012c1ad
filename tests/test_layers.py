"""Imports follow the layers, listed here and in docs/architecture.md: a package imports only from lower layers."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import ROOT

SOURCE = ROOT / "src" / "thanos"

LAYERS = (
    "errors _version settings",
    "events",
    "system",
    "patterns",
    "registry",
    "recipe",
    "checkpoint solvers",
    "sparse",
    "model",
    "calibration shrink",
    "engine",
    "run",
    "evaluation export planning recovery",
    "bench",
    "study",
    "comparison",
    "cli",
)
"""Packages of each layer, the lowest layer first. A package imports only from itself and from lower layers."""

LEVEL = {room: number for number, layer in enumerate(LAYERS) for room in layer.split()}


def modules() -> list[Path]:
    return sorted(path for path in SOURCE.rglob("*.py") if path.parent != SOURCE or not path.name.startswith("__"))


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Dotted names below ``thanos`` that a file imports anywhere, including imports for the type checker alone."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("thanos.") for name in names if name.startswith("thanos."))


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_module_imports_from_its_room_or_from_a_lower_layer(path):
    own = room(path)
    for name in imported(path):
        other = name.split(".")[0]
        if other.startswith("__") or other == own:
            continue
        assert LEVEL[other] < LEVEL[own], f"{own} must not import {other} ({name})"


def test_every_room_is_in_a_layer_and_few_modules_stand_alone():
    assert {room(path) for path in modules()} == set(LEVEL)
    alone = [path for path in SOURCE.glob("*.py") if path.name != "__init__.py"]
    assert len(alone) <= 6, alone


def test_the_tests_have_the_folders_of_the_packages():
    tests = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and list(path.rglob("test_*.py"))}
    packages = {path.name for path in SOURCE.iterdir() if (path / "__init__.py").is_file()}
    assert tests == {*packages, "benchmarks"}


def test_no_import_circle():
    """The imports at the top of files, which run at import, contain no circle."""
    dotted = {path: ".".join(path.relative_to(SOURCE).with_suffix("").parts) for path in modules()}
    names = {
        name.removesuffix(".__init__"): path for path, name in dotted.items()
    }  # a package has the name of its folder
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = set()
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("thanos"):
                base = (node.module or "").removeprefix("thanos").removeprefix(".")
                for alias in node.names:
                    inner = f"{base}.{alias.name}".lstrip(".")
                    found |= {inner} if inner in names else {base} & names.keys()
        graph[name] = found - {name}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_layers_are_those_of_the_documentation():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for one in LEVEL:
        assert f"`{one}/`" in text or f"`{one}.py`" in text, one


MOST_LINES = 300


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_file_can_be_read_in_one_sitting(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES
