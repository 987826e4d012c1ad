"""The benchmark of processor time: it runs, and it prunes the same weights with and without the measurement of errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from helpers import ROOT
from thanos.recipe import LayerRecipe
from thanos.solvers.hessian import InputStatistics
from thanos.solvers.prune_layer import prune_layer
from thanos.solvers.synthetic_layer import synthetic_layer


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    threads = torch.get_num_threads()
    import processor

    yield processor
    torch.set_num_threads(threads)
    sys.modules.pop("processor", None)


def test_every_part_is_timed(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "load_reference", lambda name, folder: lambda weight, hessian, recipe: weight)
    target = tmp_path / "processor.json"
    options = ["--size", "64", "--tokens", "128", "--repeats", "1", "--peer", str(tmp_path), "--json", str(target)]
    monkeypatch.setattr(sys, "argv", ["processor.py", *options])
    script.main()
    seconds = json.loads(target.read_text())["seconds"]
    assert len(seconds) == 13
    assert {"factor", "one error", "thanos unstructured, B = 128", "thanos unstructured, B = 128, no errors"} <= set(
        seconds
    )
    assert all(value >= 0 for value in seconds.values())


def test_without_errors_no_product_with_the_hessian_measures_them(script, monkeypatch):
    weight, hessian = synthetic_layer(16, 32, tokens=64, device="cpu")
    calls: list[int] = []
    monkeypatch.setattr("thanos.solvers.layer_solve.squared_output_norms", lambda *args: calls.append(1))
    script.without_errors(weight, hessian, LayerRecipe())
    assert not calls
    monkeypatch.undo()
    error = prune_layer(weight, InputStatistics(hessian), LayerRecipe()).error_after_compensation
    assert error is not None
    assert error < 1
