"""The scope of an unstructured budget: one for the layer, or one for each row, against a slow search by Python's sort."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import oracles
import thanos
from thanos import prune_weight, registry
from thanos.cli import run
from thanos.errors import RecipeError
from thanos.recipe import LayerRecipe, Override, Recipe
from thanos.solvers.prune_layer import PrunedWeight
from thanos.solvers.residual_mask import RowResidualMask
from thanos.solvers.row_selection import row_budgets, smallest_of_rows

QUICK = settings(max_examples=60, deadline=None, derandomize=True)

every_method = pytest.mark.parametrize("method", oracles.METHODS)


def by_row(case: oracles.Layer, method: str, weight: Tensor | None = None, **more) -> PrunedWeight:
    return prune_weight(
        case.weight if weight is None else weight, case.hessian, scope="row", **oracles.used(method, **more)
    )


def expected_budgets(scores: Tensor, count: int) -> list[int]:
    """One entry at a time to the row with the fewest, the smallest next score first; a row's own zeros come first."""
    zeros = [int((row < 0).sum()) for row in scores]
    order = [sorted(row.tolist()) for row in scores]
    taken = list(zeros)
    for _ in range(count - sum(zeros)):
        open_rows = [i for i, number in enumerate(taken) if number < scores.shape[1]]
        taken[min(open_rows, key=lambda i: (taken[i], order[i][taken[i]], i))] += 1
    return taken


@QUICK
@given(rows=st.integers(1, 6), columns=st.integers(1, 8), data=st.data())
def test_budgets_are_those_of_giving_one_entry_at_a_time(rows, columns, data):
    values = data.draw(st.lists(st.integers(-1, 6), min_size=rows * columns, max_size=rows * columns))
    scores = torch.tensor(values, dtype=torch.float32).view(rows, columns)
    count = data.draw(st.integers(0, rows * columns))
    assert row_budgets(scores, count).tolist() == expected_budgets(scores, count)


@QUICK
@given(rows=st.integers(1, 4), columns=st.integers(1, 9), data=st.data())
def test_the_smallest_of_each_row_are_those_of_sorting(rows, columns, data):
    values = data.draw(st.lists(st.integers(-3, 3), min_size=rows * columns, max_size=rows * columns))
    weight = torch.tensor(values, dtype=data.draw(st.sampled_from([torch.float32, torch.float64]))).view(rows, columns)
    norms = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 0.5, 2.0]), min_size=columns, max_size=columns)))
    norms = norms.to(weight.dtype)
    zeros = data.draw(st.sampled_from([None, weight == 0]))
    counts = torch.tensor(data.draw(st.lists(st.integers(0, columns), min_size=rows, max_size=rows)))
    width = data.draw(st.integers(1, columns))
    scores = weight.abs() * norms if zeros is None else (weight.abs() * norms).masked_fill(zeros, -1.0)
    expected = torch.stack([oracles.smallest_of(row, int(n)) for row, n in zip(scores, counts, strict=True)])
    assert torch.equal(smallest_of_rows(weight, norms, zeros, counts, width), expected[:, :width])


@pytest.mark.parametrize("block", [1, 5, 16, 64])
def test_a_residual_mask_spends_every_rows_budget_exactly_though_the_weights_change(block):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(7, 40, generator=generator)
    zeros = weight.abs() < 0.2
    norms = torch.rand(40, generator=generator) + 0.1
    budgets = torch.tensor([0, 40, 20, 21, 7, 33, 20]).maximum(zeros.sum(1))
    residual, left = RowResidualMask(norms, zeros, budgets), budgets.clone()
    removed = torch.zeros_like(zeros)
    for start in range(0, 40, block):
        stop = min(start + block, 40)
        scores = (weight[:, start:] * norms[start:]).abs().masked_fill(zeros[:, start:], -1.0)
        expected = torch.stack([oracles.smallest_of(row, int(n)) for row, n in zip(scores, left, strict=True)])
        removed[:, start:stop] = residual.take(weight, start, stop)
        assert torch.equal(removed[:, start:stop], expected[:, : stop - start])
        left -= removed[:, start:stop].sum(1)
        weight[:, stop:] *= torch.rand(7, 40 - stop, generator=generator) + 0.5
        weight[zeros] = 0.0
    assert removed.sum(1).tolist() == budgets.tolist()
    assert bool(removed[zeros].all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block_size", [1, 7, 16, 40, 128])
@every_method
def test_rows_differ_by_at_most_one_and_the_total_is_exact(method, block_size, dtype):
    case = oracles.layer(11, 40, seed=1, dtype=dtype)
    for sparsity in (0.01, 0.29, 0.5, 0.77, 0.99):
        result = by_row(case, method, sparsity=sparsity, block_size=block_size)
        removed = (~result.kept).sum(1)
        assert int(removed.sum()) == oracles.weights_to_remove(sparsity, 11, 40)
        assert int(removed.max() - removed.min()) <= 1
        assert result.zeros == int(removed.sum())


@pytest.mark.parametrize("keep", [False, True])
@every_method
def test_outlier_rows_stay_dense_and_the_others_share_the_budget(method, keep):
    case = oracles.layer(13, 32, seed=2)
    result = by_row(case, method, sparsity=0.45, outlier_rows=0.2, keep_budget=keep, block_size=8)
    removed = (~result.kept).sum(1)
    assert result.outliers.tolist() == oracles.outlier_indices(case.weight, case.hessian, 0.2)
    assert not removed[result.outliers].any()
    others = torch.ones(13, dtype=torch.bool).index_fill(0, result.outliers, False)
    assert int(removed.sum()) == math.floor(0.45 * 13 * 32)
    assert int(removed[others].max() - removed[others].min()) <= 1


@pytest.mark.parametrize("alpha", [0.0, 0.15])
@every_method
def test_a_row_with_more_zeros_than_its_budget_keeps_them_and_the_total_stays_exact(method, alpha):
    case = oracles.layer(14, 32, seed=3)
    weight = case.weight.clone()
    weight[2, :28] = 0.0
    weight[9] = 0.0
    weight[torch.rand(14, 32, generator=torch.Generator().manual_seed(4)) < 0.1] = 0.0
    result = by_row(case, method, weight, sparsity=0.5, outlier_rows=alpha, block_size=6)
    assert bool((result.weight[weight == 0] == 0).all())
    assert result.zeros == 14 * 32 // 2
    heavy = [2, 9]
    light = [i for i in range(14) if i not in [*heavy, *result.outliers.tolist()]]
    removed = (~result.kept).sum(1)
    assert removed[heavy].tolist() == (weight[heavy] == 0).sum(1).tolist()
    assert int(removed[light].max() - removed[light].min()) <= 1
    few = by_row(case, method, weight, sparsity=0.05, outlier_rows=alpha, block_size=6)
    assert torch.equal(few.weight == 0, weight == 0), "more zeros than asked for: all stay, and nothing else goes"


def test_thanos_removes_per_row_what_the_formula_says():
    case = oracles.layer(6, 24, seed=5)
    hessian = oracles.damped(case.hessian, 0.01)
    norms = case.hessian.diagonal().sqrt()
    left = expected_budgets(case.weight.abs() * norms, 72)
    weight = case.weight.clone()
    for start in range(0, 24, 8):
        chosen = torch.stack(
            [oracles.smallest_of((weight[i, start:].abs() * norms[start:]), left[i]) for i in range(6)]
        )[:, :8]
        left = [n - int(row.sum()) for n, row in zip(left, chosen, strict=True)]
        remove = torch.zeros(6, 24 - start, dtype=torch.bool)
        remove[:, :8] = chosen
        weight[:, start:] = torch.stack(
            [oracles.formula_a(weight[i, start:], remove[i], hessian[start:, start:]) for i in range(6)]
        )
    result = by_row(case, "thanos", sparsity=0.5, block_size=8)
    assert left == [0] * 6
    assert torch.equal(result.kept, weight != 0)
    assert_close(result.weight, weight, rtol=1e-8, atol=1e-10)


def test_sparsegpt_splits_every_rows_budget_over_the_blocks():
    case = oracles.layer(9, 48, seed=6)
    result = by_row(case, "sparsegpt", sparsity=0.5, block_size=16)
    assert set((~result.kept).sum(1).tolist()) == {24}
    for start in range(0, 48, 16):
        assert set((~result.kept[:, start : start + 16]).sum(1).tolist()) == {8}
    whole = by_row(case, "sparsegpt", sparsity=0.5, block_size=48)
    inverse = torch.linalg.inv(oracles.damped(case.hessian, 0.01))
    upper = torch.linalg.cholesky(inverse, upper=True)
    scores = (case.weight / upper.diagonal()).abs()
    assert torch.equal(~whole.kept, torch.stack([oracles.smallest_of(row, 24) for row in scores]))


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize("scope", ["layer", "row"])
def test_scored_methods_compare_within_the_scope(method, scope):
    case = oracles.layer(8, 20, seed=7)
    result = prune_weight(case.weight, case.hessian, method=method, scope=scope)
    scores = case.weight.abs() * (case.hessian.diagonal().sqrt() if method == "wanda" else 1.0)
    expected = (
        oracles.smallest_of(scores, 80)
        if scope == "layer"
        else torch.stack([oracles.smallest_of(row, 10) for row in scores])
    )
    assert torch.equal(~result.kept, expected)


@every_method
def test_none_is_the_methods_own_scope(method):
    case = oracles.layer(8, 40, seed=8)
    arguments = oracles.used(method, sparsity=0.4, block_size=16)
    own = registry.method(method).scope
    default = prune_weight(case.weight, case.hessian, **arguments)
    results = {scope: prune_weight(case.weight, case.hessian, scope=scope, **arguments) for scope in registry.SCOPES}
    for scope, result in results.items():
        assert torch.equal(result.kept, default.kept) == (scope == own)
        assert torch.equal(result.weight, default.weight) == (scope == own)
    assert LayerRecipe(method=method).resolved_scope == own


@every_method
def test_permuting_the_rows_permutes_the_result(method):
    case = oracles.layer(9, 31, seed=9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    expected = by_row(case, method, block_size=8, sparsity=0.37)
    actual = by_row(case, method, case.weight[order], block_size=8, sparsity=0.37)
    assert torch.equal(actual.kept, expected.kept[order])
    assert_close(actual.weight, expected.weight[order], rtol=1e-9, atol=1e-12)


# --- the setting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "columns"])
def test_other_patterns_refuse_a_scope(pattern):
    with pytest.raises(RecipeError, match=rf"scope 'row' has no meaning for pattern {pattern}.*leave scope out"):
        LayerRecipe(pattern=pattern, scope="row")
    case = oracles.layer(4, 8, seed=1)
    with pytest.raises(RecipeError, match="no meaning"):
        prune_weight(case.weight, case.hessian, pattern=pattern, scope="layer")


@pytest.mark.parametrize(("value", "hint"), [("rows", r" \(did you mean row\?\)"), (1, ""), ("", "")])
def test_an_unknown_scope_is_refused(value, hint):
    with pytest.raises(RecipeError, match=f"scope must be layer or row; got {value!r}{hint}$"):
        LayerRecipe(scope=value)


def test_an_override_sets_the_scope_of_some_layers():
    recipe = Recipe(overrides=(Override(match="*.o_proj", settings={"scope": "row"}),))
    assert recipe.for_layer("model.layers.0.self_attn.o_proj").scope == "row"
    assert recipe.for_layer("model.layers.0.self_attn.q_proj").scope is None


def test_an_override_with_another_pattern_does_not_inherit_the_scope():
    recipe = Recipe(scope="row", overrides=(Override(match="*.o_proj", settings={"pattern": "2:4"}),))
    assert recipe.for_layer("a.o_proj").scope is None
    assert recipe.for_layer("a.q_proj").scope == "row"
    assert recipe.suited({"pattern": "columns"})["scope"] is None
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    with pytest.raises(RecipeError, match="no meaning"):
        Recipe(overrides=(Override(match="a", settings={"pattern": "2:4", "scope": "row"}),))


def test_layers_without_inputs_keep_the_scope():
    weight = oracles.layer(6, 20, seed=1).weight
    result = prune_weight(weight, torch.zeros(20, 20, dtype=torch.float64), method="wanda", scope="row")
    assert result.method == "magnitude"
    assert set((~result.kept).sum(1).tolist()) == {10}


def test_a_run_gives_every_row_of_the_model_the_same_budget(tiny_llama: Path, text_file: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    arguments = ["--calibration", str(text_file), "--samples", "4", "--sequence-length", "32", "--quiet"]
    assert run(["prune", str(tiny_llama), str(out), "--scope", "row", "--sparsity", "0.4", *arguments]) == 0
    report = json.loads((out / "pruning.json").read_text())
    assert report["recipe"]["scope"] == "row"
    assert thanos.Recipe.from_toml(out / "recipe.toml").scope == "row"
    assert "| scope of the budget | one for every row |" in (out / "README.md").read_text()
    pruned = transformers.AutoModelForCausalLM.from_pretrained(out)
    for layer in report["layers"]:
        zeros = (pruned.get_submodule(layer["name"]).weight == 0).sum(1)
        assert int(zeros.sum()) == math.floor(0.4 * zeros.numel() * layer["shape"][1])
        assert int(zeros.max() - zeros.min()) <= 1
    capsys.readouterr()
    assert run(["prune", str(tiny_llama), str(tmp_path / "no"), "--scope", "row", "--pattern", "2:4", *arguments]) == 2
    assert "no meaning for pattern 2:4" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_with_the_setting_off_nothing_mentions_it(tiny_llama: Path, text_file: Path, tmp_path: Path):
    recipe = Recipe(calibration=str(text_file), samples=2, sequence_length=16)
    thanos.prune(tiny_llama, tmp_path / "out", recipe)
    for name in ("pruning.json", "README.md", "run.json", "recipe.toml"):
        assert "scope" not in (tmp_path / "out" / name).read_text()
