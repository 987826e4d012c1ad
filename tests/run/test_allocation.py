"""``allocation = "error"``: sparsities by layer at the same number of zeros, from curves of the dense model."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import oracles
import thanos
from helpers import save_tiny
from launching import torchrun
from reports import contents
from thanos.calibration.windows import build_calibration
from thanos.cli import run
from thanos.engine.stages.measure import ROWS, SPREAD, error_curve
from thanos.errors import RecipeError
from thanos.recipe import LayerRecipe, Override
from thanos.recipe.allocation import is_allocated
from thanos.run import allocation as allocation_module
from thanos.solvers.hessian import InputStatistics

BLOCKS = 3


def recipe(text: Path, **changes: Any) -> thanos.Recipe:
    settings = {"calibration": str(text), "samples": 6, "sequence_length": 32, "device": "cpu", "sparsity": 0.6}
    return thanos.Recipe(**settings | {"allocation": "error"} | changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("allocation") / "model", num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def whole(model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("allocated") / "out"
    return out, thanos.prune(model, out, recipe(text_file))


def chosen(report: Any) -> dict[str, float]:
    return {name: layer["sparsity"] for name, layer in report.execution["allocation"]["layers"].items()}


# --- a run -------------------------------------------------------------------------------------------------------------


def test_the_total_is_that_of_the_uniform_run_and_every_layer_has_its_choice(model, whole, text_file, tmp_path):
    out, report = whole
    uniform = thanos.prune(model, tmp_path / "uniform", recipe(text_file, allocation="uniform"))
    assert report.totals["zeros_targeted"] == uniform.totals["zeros_targeted"]
    sparsities = chosen(report)
    assert {layer.name: layer.sparsity for layer in report.layers} == sparsities
    assert len(sparsities) == len(uniform.layers)
    assert all(0.6 - SPREAD - 0.01 <= sparsity <= 0.6 + SPREAD + 0.01 for sparsity in sparsities.values())
    assert len(set(sparsities.values())) > 3
    pruned = transformers.AutoModelForCausalLM.from_pretrained(out)
    for name, sparsity in sparsities.items():
        weight = pruned.get_submodule(name).weight
        assert int((weight == 0).sum()) == round(sparsity * weight.numel())
    written = json.loads((out / "pruning.json").read_text())
    assert written["execution"]["allocation"] == report.execution["allocation"]
    assert written["execution"]["allocation"]["zeros"] == report.totals["zeros_targeted"]
    assert written["recipe"]["allocation"] == "error"
    assert report.phases["allocate"].seconds > 0
    assert "| allocation of the zeros | by error: " in (out / "README.md").read_text()
    assert thanos.Recipe.from_toml(out / "recipe.toml").allocation == "error"


def test_the_choice_has_the_least_weighted_error_of_all_moves_of_zeros_between_two_layers(whole):
    """At the minimum no zero can move: the marginal errors of all layers between their bounds are equal, to one piece."""
    layers = whole[1].execution["allocation"]["layers"]
    steepest, flattest = 0.0, float("inf")
    for name, layer in layers.items():
        rows, columns = next(one.shape for one in whole[1].layers if one.name == name)
        points = layer["errors"]
        for (s0, e0), (s1, e1) in pairwise(points):
            slope = layer["gain"] * (e1 - e0) / (s1 - s0) / (rows * columns)
            if s1 <= layer["sparsity"] - 0.01:
                steepest = max(steepest, slope)
            if s0 >= layer["sparsity"] + 0.01:
                flattest = min(flattest, slope)
    # Whole intervals, taken and not taken, need not be convex; they may differ by the noise of the curves.
    assert steepest <= 1.3 * flattest


def test_the_pass_over_the_dense_model_measures_gains_as_whole_models_show_them(model, whole, text_file):
    """The oracle prunes one layer of the first block in transformers' model and looks at the block's output."""
    allocation = whole[1].execution["allocation"]
    assert allocation["sequences"] == 6
    dense = transformers.AutoModelForCausalLM.from_pretrained(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    ids = build_calibration(
        str(text_file), tokenizer, samples=6, sequence_length=32, seed=0, end_of_text_id=tokenizer.eos_token_id
    ).ids
    inputs, outputs = {}, []
    block = dense.model.layers[0]

    def keep(_: Any, __: Any, result: Any) -> None:
        outputs.append(result[0] if isinstance(result, tuple) else result)

    block.register_forward_hook(keep)
    for name in ("self_attn.v_proj", "mlp.down_proj"):
        layer = block.get_submodule(name)
        handle = layer.register_forward_pre_hook(lambda _, args: inputs.setdefault("x", []).append(args[0]))
        outputs.clear()
        inputs.clear()
        with torch.no_grad():
            for row in ids:
                dense(row[None])
            handle.remove()
            before, x = [one.double() for one in outputs[:4]], torch.cat(inputs["x"]).flatten(0, 1).double()
            weight = layer.weight.detach().clone()
            scores = weight.abs().double() * x.square().sum(0).sqrt()
            count = int(0.6 * weight.numel())
            per_row, extra = divmod(count, len(weight))
            removed = torch.stack([oracles.smallest_of(row, per_row) for row in scores])
            if extra:  # the rows whose next score is least lose one more
                order = scores.sort(1).values[:, per_row]
                for i in order.argsort()[:extra].tolist():
                    removed[i] = oracles.smallest_of(scores[i], per_row + 1)
            lost = (weight * removed).double()
            own = ((x @ lost.T).square().sum() / (x @ weight.double().T).square().sum()).item()
            layer.weight.copy_(weight.masked_fill(removed, 0.0))
            outputs.clear()
            for row in ids[:4]:
                dense(row[None])
            layer.weight.copy_(weight)
        changes = [
            (after.double() - one).square().sum(-1) / one.square().sum(-1)
            for after, one in zip(outputs, before, strict=True)
        ]
        gain = torch.cat([change.flatten() for change in changes]).mean().item() / own
        found = allocation["layers"][f"model.layers.0.{name}"]["gain"]
        assert found == pytest.approx(gain, rel=1e-2), name


@pytest.mark.parametrize("method", oracles.METHODS)
def test_a_curve_is_what_the_method_does_to_the_rows(method):
    case = oracles.layer(ROWS, 40, seed=1)
    settings = LayerRecipe(method=method, sparsity=0.5)
    curve = error_curve(case.weight, InputStatistics(case.hessian, dtype=torch.float64), settings, "a")
    assert curve.sparsities == pytest.approx([0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65])
    for sparsity, error in zip(curve.sparsities, curve.errors, strict=True):
        expected = thanos.prune_weight(case.weight, case.hessian, method=method, sparsity=sparsity)
        assert error == pytest.approx(expected.error_after_compensation, rel=1e-9)
    wide = error_curve(case.weight.repeat(5, 1), InputStatistics(case.hessian, dtype=torch.float64), settings, "a")
    assert wide.size == 5 * 40 * ROWS
    assert wide.errors == pytest.approx(curve.errors, rel=0.3)


def test_curves_stay_within_what_outlier_rows_leave():
    case = oracles.layer(20, 40, seed=2)
    settings = LayerRecipe(sparsity=0.7, outlier_rows=0.2)
    curve = error_curve(case.weight, InputStatistics(case.hessian, dtype=torch.float64), settings, "a")
    assert max(curve.sparsities) < 0.8
    assert 0.7 in curve.sparsities


# --- interruption, processes -------------------------------------------------------------------------------------------


class Stop(Exception):  # noqa: N818
    """Ends a run."""


def test_an_interrupted_run_keeps_its_choice_and_ends_in_the_same_bytes(model, whole, text_file, tmp_path, monkeypatch):
    def watch(event: thanos.Event) -> None:
        if event.kind == "layer" and event.block == 2:
            raise Stop

    with pytest.raises(Stop):
        thanos.prune(model, tmp_path / "out", recipe(text_file), on_event=watch)
    kept = json.loads((tmp_path / ".out.partial" / "allocation.json").read_text())
    assert kept == whole[1].execution["allocation"]
    monkeypatch.setattr(allocation_module, "_measure", lambda *_: pytest.fail("measured again"))
    thanos.prune(model, tmp_path / "out", recipe(text_file), resume=True)
    assert contents(tmp_path / "out") == contents(whole[0])


def test_the_same_run_chooses_the_same(model, whole, text_file, tmp_path):
    again = thanos.prune(model, tmp_path / "again", recipe(text_file))
    assert again.execution["allocation"] == whole[1].execution["allocation"]
    assert contents(tmp_path / "again") == contents(whole[0])


@pytest.mark.slow
def test_several_processes_agree_on_one_choice(model, whole, text_file, tmp_path):
    options = ["--calibration", text_file, "--samples", 6, "--sequence-length", 32, "--device", "cpu", "--quiet"]
    options += ["--sparsity", 0.6, "--allocation", "error"]
    done = torchrun(2, ["-m", "thanos"], ["prune", model, tmp_path / "out", *options])
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert report["totals"]["zeros_targeted"] == whole[1].totals["zeros_targeted"]
    found = report["execution"]["allocation"]["layers"]
    assert {layer["name"]: layer["sparsity"] for layer in report["layers"]} == {
        name: layer["sparsity"] for name, layer in found.items()
    }
    for name, sparsity in chosen(whole[1]).items():
        assert found[name]["sparsity"] == pytest.approx(sparsity, abs=0.011), name
        assert found[name]["errors"] == [
            pytest.approx(point, rel=1e-3) for point in whole[1].execution["allocation"]["layers"][name]["errors"]
        ]


def test_experts_without_tokens_keep_the_recipes_sparsity(text_file, tmp_path):
    dense = save_tiny(tmp_path / "olmoe", "olmoe")
    settings = recipe(text_file, samples=1, sequence_length=4)
    report = thanos.prune(dense, tmp_path / "out", settings)
    measured = chosen(report)
    others = [layer for layer in report.layers if layer.name not in measured]
    assert measured
    assert all(layer.zeros == int(0.6 * layer.shape[0] * layer.shape[1]) for layer in others)
    uniform = sum(int(0.6 * layer.shape[0] * layer.shape[1]) for layer in report.layers)
    assert report.totals["zeros_targeted"] == uniform


def test_blocks_that_read_what_earlier_ones_stored_are_measured_sequence_by_sequence(text_file, tmp_path):
    folder = save_tiny(tmp_path / "model", "gemma-4")
    report = thanos.prune(folder, tmp_path / "out", recipe(text_file, allocation="error"))
    assert {layer.block for layer in report.layers} == {0, 1, 2, 3}
    assert len({layer.sparsity for layer in report.layers}) > 4
    weights = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    assert sum(layer.zeros for layer in report.layers) == pytest.approx(0.6 * weights, abs=len(report.layers))


def test_a_repair_works_on_the_sparsities_that_were_chosen(model, whole, text_file, tmp_path):
    report = thanos.prune(model, tmp_path / "out", recipe(text_file, effort="high", scope="layer", held_out=1))
    assert report.execution["allocation"] == whole[1].execution["allocation"], "measured with the method alone"
    assert {layer.name: layer.sparsity for layer in report.layers} == chosen(whole[1])


# --- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["2:4", "columns"])
def test_patterns_with_a_fixed_sparsity_or_whole_columns_are_refused(pattern, capsys, tmp_path, model, text_file):
    with pytest.raises(RecipeError, match=rf"allocation error does not fit pattern {pattern}"):
        thanos.Recipe(allocation="error", pattern=pattern)
    options = ["--pattern", pattern, "--allocation", "error", "--calibration", str(text_file)]
    assert run(["prune", str(model), str(tmp_path / "out"), *options]) == 2
    assert "does not fit pattern" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["errors", "", None, 1])
def test_an_unknown_allocation_is_refused(value):
    with pytest.raises(RecipeError, match="allocation must be uniform or error; got"):
        thanos.Recipe(allocation=value)


def test_layers_with_a_sparsity_of_their_own_take_no_part(model, text_file, tmp_path):
    overrides = (
        Override(match="q_proj", settings={"sparsity": 0.3}),
        Override(match="k_proj", settings={"pattern": "2:4"}),
        Override(match="v_proj", skip=True),
        Override(match="o_proj", settings={"damping": 0.1}),
    )
    settings = recipe(text_file, overrides=overrides)
    assert [is_allocated(settings, f"layers.0.{name}_proj") for name in ("q", "k", "v", "o", "up")] == [
        False, False, False, True, True,
    ]  # fmt: skip
    report = thanos.prune(model, tmp_path / "out", settings)
    assert not any(part in name for name in chosen(report) for part in ("q_proj", "k_proj", "v_proj"))
    for layer in report.layers:
        size = layer.shape[0] * layer.shape[1]
        if "q_proj" in layer.name:
            assert layer.zeros == int(0.3 * size)
        if "k_proj" in layer.name:
            assert (layer.pattern, layer.zeros) == ("2:4", size // 2)
    others = [layer for layer in report.layers if layer.name in chosen(report)]
    assert sum(layer.zeros for layer in others) == sum(int(0.6 * a * b) for a, b in (layer.shape for layer in others))


def test_with_the_setting_off_nothing_mentions_it(model, text_file, tmp_path):
    thanos.prune(model, tmp_path / "out", recipe(text_file, allocation="uniform"))
    for name in ("pruning.json", "README.md", "run.json", "recipe.toml"):
        assert "allocat" not in (tmp_path / "out" / name).read_text()
