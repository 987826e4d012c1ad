"""The registry: no other module contains the name of a method or pattern; both can come from a file outside the package."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import oracles
import thanos
from helpers import ROOT
from thanos import registry
from thanos.cli import run
from thanos.errors import RecipeError
from thanos.patterns.unstructured import Unstructured
from thanos.recipe.layer import LayerRecipe
from thanos.registry import MethodRow, Needs, PatternRow
from thanos.solvers.hessian import InputStatistics
from thanos.solvers.problem import Problem, Solution
from thanos.solvers.prune_layer import prune_layer

SOURCE = ROOT / "src" / "thanos"
MANUAL = ROOT / "docs" / "add-a-method.md"

# --- nobody else names a method or a pattern --------------------------------------------------------------------------

PROSE = "study/report/sections/"
"""Folder of modules that may contain names of methods, since a report's text is about the paper's methods."""

THE_PROGRAM = {
    "bench/layer.py": 1,  # this package's implementation, beside references
    "bench/measure.py": 1,  # versions
    "cli/__init__.py": 1,
    "cli/app.py": 2,
    "cli/compare.py": 1,  # the command line of a comparison
    "cli/demo.py": 1,  # likewise
    "cli/torchrun.py": 2,
    "evaluation/perplexity.py": 1,  # versions
    "evaluation/score_cache.py": 1,  # the cache's folder
    "evaluation/tasks.py": 1,  # versions
    "run/setup.py": 1,  # versions
    "sparse/ops.py": 1,  # the operators' library
    "study/report/figures/draw.py": 1,  # a figure's creator
}
"""File → number of strings ``thanos`` in it that mean the program, not the method."""

ORDINARY = {
    "cli/bench_model.py": ["blocks", "heads"],  # sizes of the timed model
    "cli/demo.py": ["16:32", "neurons"],  # what the demo shows
    "cli/interrupts.py": ["blocks"],
    "recovery/pair.py": ["blocks"],  # the parameters that are trained
    "recovery/recipe.py": ["blocks", "blocks"],
    "run/prune.py": ["blocks"],
    "run/setup.py": ["blocks"],
    "run/work_folder.py": ["blocks"],
    "shrink/config.py": ["blocks", "heads"],  # in messages
    "study/report/figures/charts.py": ["blocks"],
    "study/report/sections/blocks.py": ["blocks"],  # in prose
}
"""File → strings in it that are also the name of a pattern, but mean the word, or are what the demo shows."""

OWN_FILES = {
    *("registry/__init__.py", "registry/pattern_rows.py"),
    "patterns/units.py",  # the kinds of units, which have the names of their patterns
    *(f"patterns/{name}.py" for name in ("unstructured", "columns", "nm", "neurons", "heads", "width", "blocks")),
}
IN_SENTENCES = {
    "cli/bench_layer.py": ["SparseGPT", "sparsegpt", "sparsegpt", "2:4", "2:4"],  # examples of the command line
    "cli/bench_model.py": ["2:4", "2:4"],
    "cli/demo.py": ["16:32"],  # what the demo shows
    "cli/inspect.py": ["2:4"],
    "cli/prune.py": ["2:4"],
    "export/candidates.py": ["16:32"],  # advice to the user
}
"""File → names of methods and patterns in its texts, docstrings excluded. Names that are also English words do not count."""

PATTERN_CLASSES = {"Unstructured", "Columns", "NM", "Neurons", "Heads", "Width", "Blocks"}
METHOD_MODULES = "thanos.solvers.methods"


def modules() -> list[Path]:
    return sorted(
        path
        for path in SOURCE.rglob("*.py")
        if not str(path.relative_to(SOURCE)).startswith((PROSE, "solvers/methods/"))
    )


def named(tree: ast.AST) -> Iterator[str]:
    """Names of methods and patterns that occur in a file as whole strings, docstrings excluded."""
    names = {row.name for row in (*registry.METHODS, *registry.PATTERNS)}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and (node.value in names or re.fullmatch(r"\d+:\d+", node.value))
        ):
            yield node.value


def in_sentences(tree: ast.AST) -> Iterator[str]:
    """Names and titles of methods, and patterns such as 2:4, in the strings of a file, docstrings excluded."""
    words = {"magnitude", "thanos"}  # English, and the program
    names = {name for row in registry.METHODS for name in (row.name, row.title) if name.lower() not in words}
    wanted = re.compile(rf"\b(?:{'|'.join(sorted(names))}|unstructured|N:M|[0-9]+:[0-9]+)\b")
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield from wanted.findall(node.value)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_text_of_another_file_names_a_method_or_pattern(path: Path) -> None:
    name = str(path.relative_to(SOURCE))
    if name in OWN_FILES or name.startswith("registry/"):
        return
    found = in_sentences(ast.parse(path.read_text(encoding="utf-8")))
    assert sorted(found) == sorted(IN_SENTENCES.get(name, []))


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_other_file_names_a_method_or_pattern(path: Path) -> None:
    name = str(path.relative_to(SOURCE))
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if name in OWN_FILES:
        return
    said = list(named(tree))
    assert said.count("thanos") == THE_PROGRAM.get(name, 0)
    assert sorted(word for word in said if word != "thanos") == ORDINARY.get(name, [])
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            assert (node.id if isinstance(node, ast.Name) else node.attr) not in PATTERN_CLASSES, node.lineno
        if isinstance(node, ast.ImportFrom):
            assert not f"{node.module}".startswith(METHOD_MODULES), node.lineno
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith(METHOD_MODULES) for alias in node.names), node.lineno


def test_method_files_know_nothing_of_row_shards() -> None:
    for path in (SOURCE / "solvers" / "methods").glob("*.py"):
        assert not re.search(r"shard|peer|gather|sum_\(|ALONE", path.read_text(encoding="utf-8")), path


def test_the_first_rows_are_the_defaults() -> None:
    recipe = thanos.Recipe()
    assert (recipe.method, recipe.pattern) == (registry.METHODS[0].name, registry.PATTERNS[0].name)


def test_reading_the_table_imports_no_torch() -> None:
    code = (
        "import sys, thanos.registry as r; r.method_names(), r.parse_pattern('2:4'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- a method and a pattern from another file -------------------------------------------------------------------------


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The example file of docs/add-a-method.md as a plug-in named in the environment; unregistered afterwards."""
    text = re.search(r"```python\n(.*?)```", MANUAL.read_text(encoding="utf-8"), re.DOTALL)
    assert text is not None
    folder = tmp_path / "plugins"
    folder.mkdir()
    (folder / "toy_plugin.py").write_text(text[1], encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("THANOS_PLUGINS", "toy_plugin")
    monkeypatch.setattr(registry._methods, "_rows", dict(registry._methods._rows))
    monkeypatch.setattr(registry._patterns, "_rows", dict(registry._patterns._rows))
    monkeypatch.setattr("thanos.registry.table._loaded", set())
    yield importlib.import_module("toy_plugin")
    del sys.modules["toy_plugin"]


def halves(zero: torch.Tensor) -> list[tuple[bool, bool]]:
    middle = zero.shape[1] // 2
    return [(bool(row[:middle].all()), bool(row[middle:].all())) for row in zero]


def test_the_new_method_gives_what_its_formula_says(toys: ModuleType) -> None:
    case = oracles.layer(6, 16, seed=3)
    scores = case.weight.abs() * case.hessian.diagonal().sqrt().sqrt()
    found = thanos.prune_weight(case.weight, case.hessian, method="root-norm")
    for row in range(6):
        gone = sorted(range(16), key=lambda j, row=row: scores[row, j].item())[:8]
        assert sorted((~found.kept[row]).nonzero().flatten().tolist()) == sorted(gone)
    assert torch.equal(found.weight, torch.where(found.kept, case.weight, 0.0))
    groups = thanos.prune_weight(case.weight, case.hessian, method="root-norm", pattern="2:4")
    expected = oracles.groups_of(scores, 2, 4)
    assert torch.equal(~groups.kept, expected)
    columns = thanos.prune_weight(case.weight, case.hessian, method="root-norm", pattern="columns", sparsity=0.25)
    gone = sorted(range(16), key=lambda j: scores[:, j].sum().item())[:4]
    assert (~columns.kept).all(0).nonzero().flatten().tolist() == sorted(gone)
    assert int((~columns.kept).sum()) == 4 * 6


@pytest.mark.parametrize("method", [*oracles.METHODS, "root-norm"])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_every_method_prunes_by_the_new_pattern(toys: ModuleType, method: str, alpha: float) -> None:
    case = oracles.layer(7, 24, seed=5)
    case.weight[1, 3] = 0.0
    case.weight[::2, :12] *= 0.2  # some rows lose the left half, for which the right one compensates
    settings = oracles.used(method, pattern="row-halves", outlier_rows=alpha, block_size=8)
    found = thanos.prune_weight(case.weight, case.hessian, **settings)
    dense = set(found.outliers.tolist())
    assert len(dense) == (3 if alpha else 0)
    for row, (left, right) in enumerate(halves(~found.kept)):
        assert (left + right == 1) == (row not in dense)
    rows = [row for row in range(7) if row not in dense]
    assert toys.RowHalves().violation((found.weight == 0)[rows]) == ""
    if dense:
        assert "rows have no empty half" in toys.RowHalves().violation(found.weight == 0)
    if method in oracles.COMPENSATING:
        assert found.errors[method] < found.errors["removed"]


def test_a_compensating_method_reaches_the_optimum_for_the_new_patterns_mask(toys: ModuleType) -> None:
    case = oracles.layer(5, 12, seed=6)
    found = thanos.prune_weight(case.weight, case.hessian, pattern="row-halves", block_size=12, damping=0.0)
    for row in range(5):
        kept = found.kept[row].nonzero().flatten()
        target = (case.hessian @ case.weight[row])[kept]
        best = torch.linalg.solve(case.hessian[kept][:, kept], target)
        torch.testing.assert_close(found.weight[row, kept], best, rtol=1e-7, atol=1e-9)


def test_the_new_pattern_keeps_no_budget_and_refuses_odd_widths(toys: ModuleType) -> None:
    with pytest.raises(RecipeError, match="row-halves fixes what each row loses"):
        LayerRecipe(pattern="row-halves", outlier_rows=0.1, keep_budget=True)
    with pytest.raises(RecipeError, match="needs an even number"):
        thanos.prune_weight(torch.ones(2, 5), torch.eye(5), pattern="row-halves")
    with pytest.raises(RecipeError, match="method root-norm does not use damping"):
        LayerRecipe(method="root-norm", damping=0.5)


def test_a_method_says_which_patterns_it_can_do(toys: ModuleType) -> None:
    registry.register_method(
        MethodRow(
            name="picky",
            title="Picky",
            help="",
            source=toys.root_norm,
            needs=Needs.NORMS,
            patterns=("unstructured", "N:M"),
        )
    )
    assert LayerRecipe(method="picky", pattern="4:8").resolved_block_size == 128
    for pattern in ("columns", "row-halves"):
        with pytest.raises(RecipeError, match=rf"method picky cannot do pattern {pattern} .*unstructured or N:M"):
            LayerRecipe(method="picky", pattern=pattern)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda problem: None, r"bool mask of shape \[6, 16\]; it returned a NoneType"),
        (
            lambda problem: Solution(problem.weight[:, 1:], problem.zeros),
            r"it returned torch.float64 of shape \[6, 15\] and torch.bool of shape \[6, 16\]",
        ),
        (
            lambda problem: Solution(problem.weight, problem.zeros.float()),
            r"it returned torch.float64 of shape \[6, 16\] and torch.float32 of shape \[6, 16\]",
        ),
        (
            lambda problem: Solution(problem.weight, torch.ones_like(problem.zeros)),
            "says that it removed 96 entries of .*, but its weight has only 0 zeros",
        ),
    ],
    ids=["nothing", "another shape", "another dtype", "no zeros"],
)
def test_what_a_method_returns_is_checked(toys: ModuleType, wrong: Any, message: str) -> None:
    registry.register_method(MethodRow(name="wrong", title="", help="", source=wrong, needs=Needs.NORMS))
    case = oracles.layer(6, 16, seed=3)
    with pytest.raises(RecipeError, match=f"method wrong .*{message}"):
        thanos.prune_weight(case.weight, case.hessian, method="wrong")


def test_a_name_belongs_to_one_row(toys: ModuleType) -> None:
    row = registry.method("root-norm")
    assert registry.register_method(row) is row
    with pytest.raises(RecipeError, match="method wanda is registered already"):
        registry.register_method(MethodRow(name="wanda", title="", help="", source=toys.root_norm, needs=Needs.NOTHING))
    with pytest.raises(RecipeError, match="pattern columns is registered already"):
        registry.register_pattern(PatternRow(name="columns", title="", help="", source=toys.RowHalves, examples=()))


def test_a_pattern_that_nobody_registered_is_refused() -> None:
    class Stranger(Unstructured):
        pass

    with pytest.raises(RecipeError, match="unstructured is not registered; call register_pattern"):
        registry.pattern_row(Stranger())


def test_a_plugin_that_cannot_be_imported_is_a_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THANOS_PLUGINS", "no_such_plugin")
    with pytest.raises(RecipeError, match="THANOS_PLUGINS names no_such_plugin, which cannot be imported"):
        registry.method_names()
    done = subprocess.run([sys.executable, "-m", "thanos", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: THANOS_PLUGINS names no_such_plugin")


def test_help_lists_the_new_method_and_pattern(toys: ModuleType) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "thanos", "prune", "--help"], capture_output=True, text=True, check=True
    )
    text = re.sub(r"-\s+", "-", done.stdout)  # lines break at hyphens
    assert "root-norm" in text
    assert "row-halves" in text


def test_the_help_of_inspect_lists_the_new_pattern(toys: ModuleType) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "thanos", "inspect", "--help"], capture_output=True, text=True, check=True
    )
    assert "this pattern: N:M, columns, or row-halves" in " ".join(re.sub(r"-\s+", "-", done.stdout).split())


def test_the_command_line_plans_prunes_and_inspects_by_both(
    toys: ModuleType, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'method = "root-norm"\npattern = "row-halves"\ncalibration = "{text_file}"\nsamples = 4\nsequence_length = 32\n'
        'device = "cpu"\n[[override]]\nmatch = "q_proj"\nmethod = "thanos"\nblock_size = 8\n',
        encoding="utf-8",
    )
    out, plan = tmp_path / "out", tmp_path / "plan.json"
    words = ["prune", str(tiny_llama), str(out), "--recipe", str(recipe), "--quiet"]
    assert run([*words, "--plan", "--json", str(plan)]) == 0
    assert json.loads(plan.read_text())["recipe"]["method"] == "root-norm"
    assert run(words) == 0
    report = json.loads((out / "pruning.json").read_text())
    methods = {layer["name"].split(".")[-1]: layer["method"] for layer in report["layers"]}
    assert methods.pop("q_proj") == "thanos"
    assert set(methods.values()) == {"root-norm"}
    assert {layer["sparsity"] for layer in report["layers"]} == {0.5}
    assert thanos.inspect_checkpoint(out, require="row-halves").violations == []
    assert run(["inspect", str(out), "--require", "2:4", "--quiet"]) == 1
    assert run([*words[:2], str(tmp_path / "other"), "--method", "root-norm", "--damping", "0.5"]) == 2


@pytest.mark.slow
def test_a_study_compares_both_and_reports_them(
    toys: ModuleType, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    data, study, out = tmp_path / "data", tmp_path / "study.toml", tmp_path / "study"
    shutil.copytree(tiny_llama, data / "tiny")
    shutil.copyfile(text_file, data / "prose.txt")
    study.write_text(
        'models = ["tiny"]\n[evaluation]\ntext = "prose.txt"\nsequence_length = 64\nmax_windows = 2\n'
        '[[grid]]\nmethod = ["root-norm", "thanos"]\npattern = "row-halves"\ncalibration = "prose.txt"\nsamples = 4\n'
        "sequence_length = 32\nblock_size = 8\ndamping = 0.1\n",
        encoding="utf-8",
    )
    assert thanos.run_study(study, out, data=data, devices=["cpu"]).count("done") == 3
    cells = {record.cell["method"]: record.cell for record in thanos.read_store(out).records}
    assert (cells["root-norm"]["block_size"], cells["root-norm"]["damping"]) == (None, None)
    assert (cells["thanos"]["block_size"], cells["thanos"]["damping"]) == (8, 0.1)
    assert run(["report", str(out), "--quiet"]) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Root norm" in page
    assert "row-halves" in page


# --- retarget, method, refine -----------------------------------------------------------------------------------------


def test_a_layer_is_retargeted_solved_and_refined_with_the_error_after_each_step() -> None:
    case = oracles.layer(6, 16, seed=8)
    inputs = InputStatistics(case.hessian, dtype=torch.float64)

    def doubled(problem: Problem) -> Problem:
        return replace(problem, weight=problem.weight * 2, block_size=8)

    def back(problem: Problem, solution: Solution) -> Solution:
        assert torch.equal(problem.weight[0], case.weight[0] * 2)
        return Solution(solution.weight / 2, solution.removed)

    def optimum(problem: Problem, solution: Solution) -> Solution:
        weight = solution.weight.clone()
        for row, kept in enumerate(~solution.removed):
            target = (case.hessian @ case.weight[row])[kept]
            weight[row, kept] = torch.linalg.solve(case.hessian[kept][:, kept], target)
        return Solution(weight, solution.removed)

    recipe = LayerRecipe(method="wanda")
    plain = prune_layer(case.weight, inputs, recipe)
    found = prune_layer(case.weight, inputs, recipe, retarget=doubled, refinements={"back": back, "optimum": optimum})
    assert list(found.errors) == ["removed", "wanda", "back", "optimum"]
    assert torch.equal(found.kept, plain.kept)
    removed = torch.where(plain.kept, case.weight, 0.0)
    before = oracles.relative_error(case.weight, removed, case.hessian)
    assert found.errors["removed"] == pytest.approx(before)
    assert found.errors["wanda"] == pytest.approx(oracles.relative_error(case.weight, 2 * removed, case.hessian))
    assert found.errors["back"] == pytest.approx(before)
    assert found.errors["optimum"] == pytest.approx(oracles.relative_error(case.weight, found.weight, case.hessian))
    assert found.errors["optimum"] < before
    assert (found.error_before_compensation, found.error_after_compensation) == (
        found.errors["removed"],
        found.errors["optimum"],
    )
    assert plain.errors == {"removed": plain.errors["removed"], "wanda": plain.errors["removed"]}
    assert (plain.condition, plain.damping) == (None, None)


def test_the_condition_of_the_damped_hessian_belongs_to_the_result() -> None:
    case = oracles.layer(4, 12, seed=9)
    found = thanos.prune_weight(case.weight, case.hessian, damping=0.05)
    scaled = case.hessian / case.hessian.diagonal().mean()
    exact = torch.linalg.cond(scaled + 0.05 * torch.eye(12, dtype=torch.float64)).item()
    assert found.condition is not None
    assert exact / 3 < found.condition < exact * 1.01
    assert thanos.prune_weight(case.weight, None, method="magnitude").errors == {}
