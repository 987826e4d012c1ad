"""Which printed formula compensates removed columns rightly: against oracles that know nothing of the code."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import ROOT, tiny_model, windows
from thanos.errors import ModelError
from thanos.recipe import Recipe
from thanos.solvers.prune_layer import prune_weight


@pytest.fixture(scope="module")
def script() -> Any:
    folder = str(ROOT / "benchmarks")
    sys.path.insert(0, folder)
    import formula

    yield formula
    sys.path.remove(folder)
    sys.modules.pop("formula", None)


def problem(rows: int = 24, columns: int = 32, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, the Gram matrix of correlated inputs, and those inputs (tokens, columns)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    inputs = torch.randn(400, columns, generator=generator, dtype=torch.float64) @ (mix + 0.5 * torch.eye(columns))
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), inputs.T @ inputs, inputs


@pytest.mark.parametrize("seed", range(4))
def test_eq13_is_the_least_squares_optimum_on_the_inputs_themselves(script: Any, seed: int) -> None:
    weight, hessian, inputs = problem(seed=seed)
    removed = script.cheapest_columns(weight, hessian, 0.25)
    errors = script.formula_errors(weight, hessian, removed, damping=0.0)
    kept = [j for j in range(weight.shape[1]) if j not in removed.tolist()]
    outputs = inputs @ weight.T
    best = torch.linalg.lstsq(inputs[:, kept], outputs).solution
    optimum = float(((inputs[:, kept] @ best - outputs) ** 2).sum() / (outputs**2).sum())
    assert errors["eq13"] == pytest.approx(optimum, rel=1e-9)
    assert errors["least_squares"] == pytest.approx(optimum, rel=1e-9)
    alone = inputs[:, removed] @ weight[:, removed].T
    assert errors["none"] == pytest.approx(float((alone**2).sum() / (outputs**2).sum()), rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_the_misprints_do_worse_than_no_compensation_on_correlated_inputs(script: Any, seed: int) -> None:
    weight, hessian, _ = problem(48, 64, seed=seed)
    errors = script.formula_errors(weight, hessian, script.cheapest_columns(weight, hessian))
    assert tuple(errors) == tuple(script.FORMULAS)
    assert errors["eq13"] == pytest.approx(errors["least_squares"], rel=1e-9)
    assert errors["eq13"] < errors["none"]
    assert errors["eq72"] > errors["eq13"]
    assert errors["algorithm7"] > errors["none"]
    assert all(math.isfinite(value) for value in errors.values())


def test_eq72_and_algorithm_7_are_read_literally(script: Any) -> None:
    weight, hessian, _ = problem(3, 4)
    removed = torch.tensor([1, 3])
    errors = script.formula_errors(weight, hessian, removed, damping=0.0)
    H, inverse = hessian.tolist(), torch.linalg.inv(hessian).tolist()
    p = [1, 3]
    small = [[H[a][b] for b in p] for a in p]
    det = small[0][0] * small[1][1] - small[0][1] * small[1][0]
    literal = {
        "eq72": [[small[1][1] / det, -small[0][1] / det], [-small[1][0] / det, small[0][0] / det]],
        "algorithm7": [[inverse[a][b] for b in p] for a in p],
    }
    for name, middle in literal.items():
        energy = change = 0.0
        for w in weight.tolist():
            left = [sum(w[p[a]] * middle[a][b] for a in range(2)) for b in range(2)]
            new = [0.0 if j in p else w[j] - sum(left[b] * H[p[b]][j] for b in range(2)) for j in range(4)]
            delta = [n - o for n, o in zip(new, w, strict=True)]
            energy += sum(w[i] * H[i][j] * w[j] for i in range(4) for j in range(4))
            change += sum(delta[i] * H[i][j] * delta[j] for i in range(4) for j in range(4))
        assert errors[name] == pytest.approx(change / energy, rel=1e-9)


def test_the_solver_is_eq13(script: Any) -> None:
    weight, hessian, _ = problem(40, 64, seed=7)
    pruned = prune_weight(weight, hessian, method="thanos", pattern="columns", sparsity=0.25)
    removed = (pruned.weight == 0).all(0).nonzero().squeeze(1)
    assert removed.tolist() == script.cheapest_columns(weight, hessian, 0.25).tolist()
    assert pruned.error_after_compensation == pytest.approx(
        script.formula_errors(weight, hessian, removed)["eq13"], rel=1e-6
    )


def test_scaling_the_hessian_changes_nothing(script: Any) -> None:
    weight, hessian, _ = problem()
    removed = script.cheapest_columns(weight, hessian)
    first, second = (
        script.formula_errors(weight, hessian, removed),
        script.formula_errors(weight, 1e-3 * hessian, removed),
    )
    for name in ("eq13", "least_squares", "none", "eq72"):
        assert first[name] == pytest.approx(second[name], rel=1e-9)


@pytest.mark.parametrize("removed", [[], list(range(32))])
def test_all_or_no_columns_are_refused(script: Any, removed: list[int]) -> None:
    weight, hessian, _ = problem()
    with pytest.raises(ValueError, match="removed columns"):
        script.formula_errors(weight, hessian, torch.tensor(removed, dtype=torch.int64))


@pytest.mark.parametrize("architecture", ["llama", "gpt-2"])
def test_a_layer_of_a_model_is_measured_on_the_inputs_that_it_gets(script: Any, architecture: str) -> None:
    model = tiny_model(architecture)
    name = "model.layers.1.mlp.down_proj" if architecture == "llama" else "transformer.h.1.mlp.c_proj"
    ids = windows(3, 16)
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    found = script.measure_layer(model, ids, name)
    inputs = seen[0].reshape(-1, seen[0].shape[-1])
    stored = model.get_parameter(f"{name}.weight").detach().double()
    weight = stored if architecture == "llama" else stored.T
    expected = script.formula_errors(weight, inputs.T @ inputs, script.cheapest_columns(weight, inputs.T @ inputs))
    assert (found["layer"], found["tokens"], found["shape"]) == (name, 48, list(weight.shape))
    assert found["removed"] == round(0.25 * weight.shape[1])
    for key, value in expected.items():
        assert found["errors"][key] == pytest.approx(value, rel=1e-4)


def test_a_layer_that_is_not_there_or_not_alone_is_refused(script: Any) -> None:
    model = tiny_model("llama")
    with pytest.raises(ModelError, match=r"matches 0 layers \(the nearest are"):
        script.measure_layer(model, windows(1, 8), "model.layers.0.mlp.down_project")
    with pytest.raises(ModelError, match="matches 3 layers"):
        script.measure_layer(model, windows(1, 8), "down_proj")


def test_the_script_measures_a_layer_and_shows_it_again(
    script: Any, tiny_llama: Path, text_file: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "Recipe", lambda **given: Recipe(**{**given, "samples": 2, "sequence_length": 32}))
    out = tmp_path / "formula.json"
    given = [str(tiny_llama), "layers.1.mlp.down_proj", "--calibration", str(text_file), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["formula.py", *given, "--json", str(out)])
    script.main()
    result, printed = json.loads(out.read_text(encoding="utf-8")), capsys.readouterr().out
    assert (result["layer"], result["tokens"]) == ("model.layers.1.mlp.down_proj", 64)
    assert result["calibration"] == {"source": text_file.name, "samples": 2, "sequence_length": 32, "seed": 0}
    assert result["errors"]["eq13"] == pytest.approx(result["errors"]["least_squares"], rel=1e-6)
    monkeypatch.setattr(sys, "argv", ["formula.py", "--show", str(out)])
    script.main()
    assert capsys.readouterr().out == printed
    assert f"| Algorithm 7 | W[:,P] · H⁻¹[P,P] · H[P,:] | {result['errors']['algorithm7']:.4g} |" in printed


def test_the_docs_say_what_was_measured() -> None:
    folder = ROOT / "docs" / "results"
    errors = json.loads((folder / "formula.json").read_text(encoding="utf-8"))["errors"]
    said = (folder / "study.md").read_text(encoding="utf-8").partition("Eq. 13 is correct")[2]
    said = " ".join(said.partition("## ")[0].split())
    words = (
        "a relative error of {eq13:.3g}.",
        "the error is {none:.3g}, with Eq. 72 it is {eq72:.3g}, and with Algorithm 7 it is {algorithm7:.3g}.",
    )
    for each in words:
        assert each.format(**errors) in said
    assert errors["eq13"] == pytest.approx(errors["least_squares"], rel=1e-6)
