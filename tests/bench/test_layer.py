"""``thanos bench layer``: what it measures, and how it calls a reference implementation that a user brings."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import oracles
from thanos import prune_weight, registry
from thanos.bench import cost_model as costs
from thanos.bench.layer import LayerSettings, relative_error, report, run
from thanos.bench.references import load_reference
from thanos.cli import run as command
from thanos.errors import DataError, RecipeError
from thanos.patterns.budget import Budget
from thanos.patterns.columns import Columns
from thanos.patterns.unstructured import Unstructured
from thanos.recipe import LayerRecipe
from thanos.registry import parse_pattern
from thanos.solvers.hessian import InputStatistics
from thanos.solvers.problem import Problem
from thanos.solvers.synthetic_layer import synthetic_layer

FAKE = """
import torch
import matplotlib.pyplot as plt
from sklearn.cluster import KMeans
from helper_beside_it import SCALE

class {name}:
    def __init__(self, layer):
        self.layer = layer
        self.H = torch.zeros(1)

    def {method}(self, sparsity, {zeros}=0, {group}=0, blocksize=1, percdamp=0.5):
        torch.cuda.synchronize()
        print("noise on the terminal")
        assert self.H.shape == (self.layer.weight.shape[1],) * 2
        weight = self.layer.weight.data.clone()
        seen.append((sparsity, {zeros}, {group}, blocksize, percdamp))
        if {zeros}:
            groups = weight.view(-1, {group})
            groups.scatter_(1, groups.abs().topk({zeros}, largest=False).indices, 0.0)
        else:
            weight.view(-1)[weight.abs().flatten().topk(int(sparsity * weight.numel()), largest=False).indices] = 0
        self.H = None
        self.layer.weight.data = weight * SCALE

seen = []
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A stand-in with the outer shape of the reference repositories: names, arguments, imports, a file beside."""
    (tmp_path / "helper_beside_it.py").write_text("SCALE = 1.0\n")
    text = FAKE.format(name="SparseGPT", method="fasterprune", zeros="prunen", group="prunem")
    (tmp_path / "sparsegpt.py").write_text(text)
    (tmp_path / "lib").mkdir()
    text = FAKE.format(name="Thanos", method="snap", zeros="prune_n", group="prune_m")
    (tmp_path / "lib" / "thanos.py").write_text(text)
    return tmp_path


@pytest.mark.parametrize("name", ["sparsegpt", "thanos"])
def test_a_reference_gets_the_same_problem_and_leaves_no_trace(name, repository, capsys):
    path, modules = list(sys.path), set(sys.modules)
    prune = load_reference(name, repository)
    weight, hessian = oracles.layer(6, 16, dtype=torch.float32).weight, torch.eye(16)
    kept = weight.clone(), hessian.clone()
    half = prune(weight, hessian, LayerRecipe(method=name, pattern="unstructured", sparsity=0.25, block_size=8))
    assert int((half == 0).sum()) == 24
    groups = prune(weight, hessian, LayerRecipe(method=name, pattern="1:4", damping=0.1))
    assert (groups.view(-1, 4) != 0).sum(1).tolist() == [1] * 24  # they count zeros, we what stays
    assert torch.equal(weight, kept[0])
    assert torch.equal(hessian, kept[1])
    assert capsys.readouterr().out == ""
    assert sys.path == path
    assert not {"matplotlib.pyplot", "sklearn.cluster"} & (set(sys.modules) - modules) or "matplotlib" in modules
    assert sys.modules["thanos"].__file__.endswith("__init__.py"), "our package was replaced by theirs"


def test_a_wrong_reference_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="thanos or sparsegpt"):
        load_reference("wanda", tmp_path)
    with pytest.raises(DataError, match=r"no sparsegpt\.py"):
        load_reference("sparsegpt", tmp_path)
    (tmp_path / "sparsegpt.py").write_text("x = 1\n")
    with pytest.raises(DataError, match="no class SparseGPT"):
        load_reference("sparsegpt", tmp_path)
    (tmp_path / "sparsegpt.py").write_text("import no_such_module\n")
    with pytest.raises(DataError, match="no_such_module"):
        load_reference("sparsegpt", tmp_path)


def test_every_method_pattern_and_block_size_is_measured_and_judged_in_float64(repository):
    settings = LayerSettings(
        shapes=((12, 32), (8, 16)), block_sizes=(8, 16), repeats=2, tokens=100, peers={"sparsegpt": repository}
    )
    results = list(run(settings))
    ours = [r for r in results if r.implementation == "thanos"]
    assert len(ours) == 2 * 2 * 2 * 2
    assert len(results) == len(ours) + 2 * 2 * 2
    weight, hessian = synthetic_layer(12, 32, tokens=100, device="cpu")
    for r in results:
        assert r.seconds > 0
        assert r.floor_seconds > 0
        assert (r.modelled_seconds is None) == (r.implementation == "reference")
        assert 0 < r.error < 1
        assert r.sparsity == pytest.approx(0.5)
        if (r.rows, r.implementation) == (12, "thanos"):
            pruned = prune_weight(weight, hessian, method=r.method, pattern=r.pattern, block_size=r.block_size)
            assert r.error == pytest.approx(oracles.relative_error(weight, pruned.weight, hessian), rel=1e-6)
    plain = json.loads(json.dumps(report(settings, results)))
    assert plain["settings"]["peers"] == ["sparsegpt"]
    assert len(plain["results"]) == len(results)
    assert set(plain["machine"]) >= {"device", "cores", "memory_bytes", "versions", "commit", "date"}
    assert str(repository) not in json.dumps(plain)


def test_the_error_does_not_depend_on_how_it_is_cut_up():
    weight, hessian = synthetic_layer(1500, 40, tokens=90, device="cpu")
    pruned = torch.where(weight.abs() < 0.5, 0.0, weight)
    assert relative_error(weight, pruned, hessian) == pytest.approx(oracles.relative_error(weight, pruned, hessian))


def test_the_synthetic_layer_is_reproducible_correlated_and_heavy_tailed():
    weight, hessian = synthetic_layer(16, 256, tokens=4096, device="cpu", seed=3)
    again = synthetic_layer(16, 256, tokens=4096, device="cpu", seed=3)
    assert torch.equal(weight, again[0])
    assert torch.equal(hessian, again[1])
    scales = hessian.diagonal().sqrt()
    assert scales.max() > 5 * scales.median()
    correlation = hessian / scales[:, None] / scales
    assert correlation.fill_diagonal_(0).abs().max() > 0.1
    near = synthetic_layer(16, 256, tokens=4096, device="cpu", duplicates=1e-3)[1]
    assert near[0, 1] / (near[0, 0] * near[1, 1]).sqrt() > 0.999


def test_the_cost_model_counts_what_the_formulas_say():
    parts = costs.solve("thanos", Unstructured(), 30, 80, 20, steps=7)
    # Blocks of 20 leave 80, 60, 40, 20 columns.
    assert parts["update"].flops == 2 * 30 * 20 * 200
    assert parts["selection"].flops == 3 * 30 * 200
    assert parts["rows"].flops == 7 * 2 * 30 * 20 * 80 + 2 * 20 * 20 * 200
    assert parts["factor"].flops == pytest.approx(2 / 3 * 80**3)
    assert parts["errors"].flops == 3 * 30 * 80 * 80
    assert costs.solve("thanos", parse_pattern("2:4"), 30, 80, 20)["selection"].flops == 0
    assert set(costs.solve("wanda", Unstructured(), 30, 80, 20)) == {"errors", "scores"}
    assert set(costs.solve("magnitude", Columns(), 30, 80, 20)) == {"errors", "scores"}
    whole = costs.solve("sparsegpt", Unstructured(), 30, 80, 500)
    assert whole["update"].flops == 2 * 30 * 80 * 80
    assert costs.Cost(10.0, 4.0).seconds(5.0, 1.0) == 4.0
    assert costs.statistics(10, 7, 2).flops == 2 * 7 * 100


def product_flops(method: str, pattern: str, weight: torch.Tensor, hessian: torch.Tensor) -> int:
    """The operations of the matrix products of a solve, as torch counts them, without the factor and the errors."""
    recipe = LayerRecipe(method=method, pattern=pattern, sparsity=0.25)
    inputs = InputStatistics(hessian)
    factor = inputs.factor(recipe.damping)
    budget = Budget.plan(weight.shape[0], weight.shape[1], recipe)
    problem = Problem(weight, weight == 0, inputs, factor, recipe.parsed_pattern, budget, recipe.resolved_block_size)

    def in_place(into: torch.Size, a: torch.Size, b: torch.Size, **_: object) -> int:
        return 2 * a[0] * a[1] * b[1]  # torch counts addmm, but not addmm_

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        registry.method(method).load()(problem)
    return counter.get_total_flops()


def modelled_flops(method: str, pattern: str, rows: int, columns: int) -> float:
    parts = costs.solve(method, parse_pattern(pattern), rows, columns, 20, sparsity=0.25)
    return sum(part.flops for name, part in parts.items() if name not in ("errors", "factor", "scores"))


def test_the_cost_of_removing_columns_counts_the_products_that_run():
    c, b, s = 24, 80, 20
    weight, hessian = synthetic_layer(c, b, tokens=400, device="cpu")
    triangular = s**3 / 3 + 2 * s**2 * c  # the Cholesky factor and its solves, which torch does not count
    assert modelled_flops("thanos", "columns", c, b) == product_flops("thanos", "columns", weight, hessian) + triangular


def test_the_cost_of_removing_units_counts_the_products_that_run():
    c, b, s = 24, 96, 24
    weight, hessian = synthetic_layer(c, b, tokens=400, device="cpu")
    r = s / 16
    widths = [b - r * number for number in range(15)]
    triangular = sum(r**3 / 3 + 2 * r**2 * (c + m - r) for m in widths) + (b - s) ** 3 / 3 + 4 * c * (b - s) ** 2
    counted = product_flops("thanos", "neurons", weight, hessian)
    # The model removes 1.5 units in each step, and the solver 1 or 2.
    assert modelled_flops("thanos", "neurons", c, b) == pytest.approx(counted + triangular, rel=0.01)


def test_sparsegpt_updates_the_remaining_columns_for_every_pattern():
    plain, columns = (costs.solve("sparsegpt", pattern, 30, 80, 20) for pattern in (Unstructured(), Columns()))
    assert {name: columns[name] for name in ("rows", "update")} == {name: plain[name] for name in ("rows", "update")}
    assert set(columns) == {"errors", "factor", "scores", "rows", "update"}


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_writes_json(tmp_path, repository, capsys):
    target = tmp_path / "out.json"
    arguments = ["bench", "layer", "--shape", "16x32", "--repeats", "1", "--device", "cpu", "--method", "sparsegpt"]
    assert command([*arguments, "--peer", f"sparsegpt={repository}", "--json", str(target)]) == 0
    printed = capsys.readouterr().out
    assert "16 × 32" in printed
    assert "sparsegpt (reference)" in printed
    assert len(json.loads(target.read_text())["results"]) == 4
    assert command([*arguments, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["benchmark"] == "layer"


def test_its_options_are_frozen_and_state_their_defaults(capsys):
    assert command(["bench", "layer", "--help"]) == 0
    text = capsys.readouterr().out.split("Options:")[1]
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) == {
        "--shape", "--method", "--pattern", "--block-size", "--sparsity", "--damping", "--tokens", "--repeats", "--seed",
        "--device", "--peer", "--threads", "--json", "--help",
    }  # fmt: skip
    for entry in re.split(r"\n  (?=-)", text)[1:]:
        assert "default" in entry or "--help" in entry


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--shape", "16"], "rows x columns"),
        (["--shape", "0x5"], "rows x columns"),
        (["--peer", "sparsegpt"], "NAME=DIR"),
        (["--peer", "sparsegpt=/nowhere"], "sparsegpt.py"),
        (["--repeats", "0"], "at least 1"),
        (["--method", "obs"], "thanos"),
        (["--shape", "4x6", "--pattern", "2:4"], "multiple of 4"),
        (["--json", "/nowhere/at/all.json"], "cannot be written"),
    ],
)
def test_mistakes_end_with_2(arguments, complaint, capsys):
    assert command(["bench", "layer", "--shape", "8x8", "--device", "cpu", *arguments]) == 2
    assert complaint in capsys.readouterr().err


def test_libraries_that_a_reference_imports_stay_whole(repository):
    code = "import json.tool, sys, xml.dom.minidom\n"  # stands for any library that nothing has imported yet
    (repository / "sparsegpt.py").write_text(code + (repository / "sparsegpt.py").read_text())
    sys.modules.pop("xml.dom.minidom", None)
    load_reference("sparsegpt", repository)
    loaded = sys.modules["xml.dom.minidom"]
    load_reference("sparsegpt", repository)
    assert sys.modules["xml.dom.minidom"] is loaded
    assert "helper_beside_it" not in sys.modules
