"""ADMM: lower errors than Thanos, exact masks, and its own rules; ``test_methods`` compares it with the oracle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import oracles
from thanos import prune_weight
from thanos.patterns.unstructured import Unstructured
from thanos.recipe.layer import LayerRecipe
from thanos.solvers.cost import Size
from thanos.solvers.hessian import InputStatistics
from thanos.solvers.methods import admm as module
from thanos.solvers.prune_layer import prune_layer

PATTERNS = ("unstructured", "2:4", "16:32", "columns")


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("seed", range(3))
def test_the_error_is_below_that_of_thanos_on_random_correlated_inputs(seed: int, pattern: str) -> None:
    case = oracles.layer(48, 96, seed=70 + seed)
    admm, thanos = (
        prune_weight(case.weight, case.hessian, method=name, pattern=pattern) for name in ("admm", "thanos")
    )
    assert admm.sparsity == thanos.sparsity
    assert admm.error_after_compensation < thanos.error_after_compensation


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_weights_are_the_optimum_of_their_mask(pattern: str) -> None:
    case = oracles.layer(16, 64, seed=75)
    found = prune_weight(case.weight, case.hessian, method="admm", pattern=pattern)
    best = oracles.best_for(case.weight, ~found.kept, oracles.damped(case.hessian, 0.01))
    assert_close(found.weight, best, rtol=1e-8, atol=1e-10)
    assert found.residuals["admm"] < 1e-10


def test_the_mask_is_never_worse_than_that_of_the_first_iteration() -> None:
    case = oracles.layer(24, 64, seed=76)
    damped = oracles.damped(case.hessian, 0.01)
    first = oracles.smallest_of((case.weight * damped.diagonal().sqrt()).abs(), 24 * 32)
    start = oracles.best_for(case.weight, first, damped)
    found = prune_weight(case.weight, case.hessian, method="admm")
    assert found.errors["admm"] < oracles.relative_error(case.weight, start, case.hessian)


def test_inputs_without_correlation_keep_the_largest_scores() -> None:
    """Then the weights that stay have nothing to compensate, and the first mask is the optimum: it must not move."""
    weight = oracles.layer(8, 32, seed=77).weight
    hessian = torch.diag(torch.linspace(0.5, 4.0, 32, dtype=torch.float64))
    found = prune_weight(weight, hessian, method="admm", damping=0.0)
    removed = oracles.smallest_of(weight.abs() * hessian.diagonal().sqrt(), 128)
    assert torch.equal(~found.kept, removed)
    assert_close(found.weight, torch.where(removed, 0.0, weight), rtol=1e-12, atol=1e-12)


def test_a_hessian_that_cannot_be_factorised_at_first_raises_the_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    case = oracles.layer(8, 32, seed=78)
    real, calls = module._UnitBasis.inverse, []

    def once_broken(self, penalty: float) -> tuple[Tensor, Tensor]:
        inverse, info = real(self, penalty)
        calls.append(penalty)
        return (inverse * float("nan"), info + 1) if len(calls) == 1 else (inverse, info)

    monkeypatch.setattr(module._UnitBasis, "inverse", once_broken)
    found = prune_weight(case.weight, case.hessian, method="admm")
    assert calls[1] > calls[0]
    assert int((~found.kept).sum()) == 128
    assert found.error_after_compensation < found.error_before_compensation


def test_the_iteration_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the mask never rests: the number of periods is bounded."""
    case = oracles.layer(8, 32, seed=79)
    monkeypatch.setattr(module, "_MOST_PERIODS", 2)
    found = prune_weight(case.weight, case.hessian, method="admm")
    best = oracles.best_for(case.weight, ~found.kept, oracles.damped(case.hessian, 0.01))
    assert_close(found.weight, best, rtol=1e-8, atol=1e-10)


def test_the_cost_grows_as_its_products() -> None:
    """An iteration is one product of (c, b) with (b, b); an inverse takes b³."""
    one, wide = (module.cost(Unstructured(), Size(64, columns, 128)) for columns in (100, 200))
    assert wide["inverses"].flops == 8 * one["inverses"].flops
    assert wide["iterations"].flops == 4 * one["iterations"].flops
    assert wide["refit"].flops == 4 * one["refit"].flops


# --- the demo model's layers --------------------------------------------------------------------------------------------

CASES = [
    (
        "unstructured",
        0.5,
        ("0.self_attn.q_proj", "0.mlp.up_proj", "10.self_attn.q_proj", "10.self_attn.o_proj", "10.mlp.down_proj"),
    ),
    ("unstructured", 0.7, ("10.self_attn.o_proj",)),
    ("2:4", None, ("0.self_attn.q_proj", "10.self_attn.q_proj", "10.self_attn.o_proj")),
    ("16:32", None, ("10.self_attn.q_proj",)),
    ("columns", 0.3, ("0.self_attn.o_proj", "10.self_attn.q_proj")),
]


@pytest.fixture(scope="module")
def demo_layers(demo_gguf: Path, thanos_data: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight and XᵀX of layers of the demo model, by name, from 4096 tokens of C4."""
    from thanos.model.loading import load_model
    from thanos.model.source import resolve_model

    source = resolve_model(str(demo_gguf))
    model, tokenizer = load_model(source, dtype="float32"), source.tokenizer()
    with (thanos_data / "c4-sample.jsonl").open(encoding="utf-8") as file:
        text = "\n".join(json.loads(next(file))["text"] for _ in range(20))
    ids = torch.tensor(tokenizer(text)["input_ids"][:4096]).view(8, 512)
    names = {f"model.layers.{name}" for _, _, names in CASES for name in names}
    modules, sums = dict(model.named_modules()), {}

    def add(name: str, inputs: Tensor) -> None:
        rows = inputs.flatten(0, -2)
        sums[name] = sums.get(name, 0.0) + rows.T @ rows

    hooks = [modules[name].register_forward_pre_hook(lambda _, args, name=name: add(name, args[0])) for name in names]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return {name: (modules[name].weight.detach().clone(), sums[name]) for name in names}


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "sparsity", "names"), CASES, ids=lambda value: str(value) if value else "")
def test_the_error_is_at_most_that_of_thanos_on_the_demo_models_layers(
    demo_layers: dict[str, tuple[Tensor, Tensor]], pattern: str, sparsity: float | None, names: tuple[str, ...]
) -> None:
    for name in names:
        weight, hessian = demo_layers[f"model.layers.{name}"]
        inputs = InputStatistics(hessian)
        admm, thanos, refitted = (
            prune_layer(weight, inputs, LayerRecipe(pattern=pattern, sparsity=sparsity, **settings))
            for settings in ({"method": "admm"}, {"method": "thanos"}, {"method": "thanos", "refit": 20})
        )
        if (
            pattern == "columns"
        ):  # the weights hold single zeros, in columns that one method removes and the other keeps
            assert int((~admm.kept).all(0).sum()) == int((~thanos.kept).all(0).sum())
        else:
            assert admm.zeros == thanos.zeros
        assert admm.error_after_compensation <= thanos.error_after_compensation, name
        assert refitted.error_after_compensation <= thanos.error_after_compensation, name
        assert admm.residuals["admm"] < 1e-2, name
