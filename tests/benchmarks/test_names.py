"""Scripts are not type-checked: here, every name that one of them takes from the package must be there."""

from __future__ import annotations

import ast
from importlib import import_module
from importlib.util import find_spec

import pytest

from helpers import ROOT

SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_every_name_that_a_script_imports_exists(script):
    tree = ast.parse(script.read_text(encoding="utf-8"))
    froms = [
        node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("thanos")
    ]
    for node in froms:
        module = import_module(str(node.module))
        for name in (alias.name for alias in node.names):
            assert hasattr(module, name) or find_spec(f"{node.module}.{name}"), f"{node.module} has no {name}"
