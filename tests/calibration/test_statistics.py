"""XᵀX of every layer's inputs, against a float64 sum made with plain hooks on the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import ARCHITECTURES, tiny_model, windows
from thanos.calibration.accumulators import Gram, SquaredNorms, add_gram
from thanos.calibration.statistics import (
    InputGroup,
    Need,
    check_finite,
    gather,
    need_of,
    need_of_all,
    plan_passes,
)
from thanos.errors import NumericsError, UserError
from thanos.model.layers import LinearLayer, linear_layers
from thanos.recipe import LayerRecipe


def oracle(model: Any, layers: list[LinearLayer], ids: Tensor) -> dict[str, Tensor]:
    """Σ x xᵀ over all tokens, token by token would be the same sum; float64."""
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1]).double()
            sums[name] = sums.get(name, torch.zeros(())) + torch.einsum("ti,tj->ij", x, x)

        return see

    handles = [layer.module.register_forward_pre_hook(hook(layer.name)) for layer in layers]
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return sums


def in_blocks(model: Any) -> list[LinearLayer]:
    return [layer for layer in linear_layers(model) if layer.block is not None]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gathered_statistics_equal_the_float64_sum(architecture: str) -> None:
    model, ids = tiny_model(architecture), windows(3, 40)
    layers = in_blocks(model)
    expected = oracle(model, layers, ids)
    with torch.inference_mode(), gather(layers) as groups:
        for row in ids:
            model(input_ids=row[None], use_cache=False)
    assert sorted(layer.name for group in groups for layer in group.layers) == sorted(layer.name for layer in layers)
    for group in groups:
        assert group.tokens == ids.numel()
        assert group.hessian.dtype == torch.float32
        for layer in group.layers:
            scale = expected[layer.name].diagonal().mean()
            torch.testing.assert_close(
                group.hessian.double() / scale, expected[layer.name] / scale, rtol=1e-5, atol=1e-5
            )


_SHARED = {
    "llama": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "opt-125m": [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]],
    "phi-3": [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]],
    "gpt-2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
}


@pytest.mark.parametrize("architecture", _SHARED)
def test_layers_that_read_one_tensor_share_one_group_in_calling_order(architecture: str) -> None:
    model = tiny_model(architecture)
    layers = [layer for layer in in_blocks(model) if layer.block == 1]
    with torch.inference_mode(), gather(layers) as groups:
        model(input_ids=windows(2, 8), use_cache=False)
    found = [sorted(layer.name.rsplit(".", 1)[-1] for layer in group.layers) for group in groups]
    assert found == [sorted(kinds) for kinds in _SHARED[architecture]]


def test_two_batches_give_what_one_gives() -> None:
    model, ids = tiny_model("llama"), windows(4, 16)
    layers = in_blocks(model)
    results = []
    for size in (4, 2, 1):
        with torch.inference_mode(), gather(layers) as groups:
            for first in range(0, 4, size):
                model(input_ids=ids[first : first + size], use_cache=False)
        results.append(groups)
    for groups in results[1:]:
        for one, other in zip(results[0], groups, strict=True):
            assert [layer.name for layer in one.layers] == [layer.name for layer in other.layers]
            assert one.tokens == other.tokens == 64
            torch.testing.assert_close(other.hessian, one.hessian, rtol=1e-4, atol=1e-3)


def test_hooks_are_gone_afterwards_even_after_an_error_and_nothing_is_kept_alive() -> None:
    model = tiny_model("llama")
    layers = in_blocks(model)
    with torch.inference_mode(), gather(layers) as groups:
        model(input_ids=windows(1, 8))
    tokens = [group.tokens for group in groups]
    model(input_ids=windows(1, 8))
    assert [group.tokens for group in groups] == tokens
    assert all(group.current is None for group in groups)
    with pytest.raises(RuntimeError, match="on purpose"), gather(layers):
        raise RuntimeError("on purpose")
    assert not any(layer.module._forward_pre_hooks for layer in layers)


def linear(name: str, columns: int = 4) -> LinearLayer:
    return LinearLayer(name, nn.Linear(columns, 3), 0, False)


def test_equal_tensors_that_are_not_the_same_tensor_are_not_shared() -> None:
    a, b = linear("a"), linear("b")
    x = torch.randn(5, 4)
    with gather([a, b]) as groups:
        a.module(x)
        b.module(x.clone())
    assert [[layer.name for layer in group.layers] for group in groups] == [["a"], ["b"]]


def test_a_layer_that_is_never_called_is_in_no_group() -> None:
    a, b = linear("a"), linear("b")
    with gather([a, b]) as groups:
        a.module(torch.randn(2, 3, 4))
    assert [[layer.name for layer in group.layers] for group in groups] == [["a"]]
    assert groups[0].tokens == 6


def test_a_layer_that_is_called_twice_in_a_pass_adds_both_inputs() -> None:
    a = linear("a")
    x, y = torch.randn(5, 4), torch.randn(7, 4)
    with gather([a]) as groups:
        a.module(x)
        a.module(y)
    torch.testing.assert_close(groups[0].hessian, x.T @ x + y.T @ y)
    assert groups[0].tokens == 12


def test_layers_that_stop_sharing_are_a_loud_error_not_a_wrong_sum() -> None:
    a, b = linear("a"), linear("b")
    x = torch.randn(5, 4)
    with gather([a, b]):
        for layer in (a, b, a):
            layer.module(x)
        with pytest.raises(AssertionError, match="b shared its input with a"):
            b.module(x.clone())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [12, 600])
def test_products_are_exact_in_float32_whatever_the_inputs(dtype: torch.dtype, width: int) -> None:
    rows = (torch.randn(300, width, generator=torch.Generator().manual_seed(1)) * 200).to(dtype)
    hessian = torch.zeros(width, width)
    for part in rows.split(70):
        add_gram(hessian, part)
    exact = rows.double().T @ rows.double()
    torch.testing.assert_close(hessian.double(), exact, rtol=1e-5, atol=1e-5 * exact.diagonal().max().item())
    off = torch.ones_like(hessian, dtype=torch.bool).tril(-256)
    assert torch.equal(hessian[off], hessian.T[off]), "what is not multiplied follows from symmetry"
    assert torch.isfinite(hessian).all()  # 200² · 300 is beyond float16's range


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 12, 256, 300, 600])
def test_squared_norms_are_the_diagonal_of_the_gram_to_the_last_bit(dtype: torch.dtype, width: int) -> None:
    rows = torch.randn(500, width, generator=torch.Generator().manual_seed(2)).to(dtype)
    gram, norms = Gram.empty(width, torch.device("cpu")), SquaredNorms.empty(width, torch.device("cpu"))
    for part in rows.split(130):
        gram.add(part)
        norms.add(part)
    assert gram.tokens == norms.tokens == 500
    assert torch.equal(norms.squared_norms(), gram.squared_norms())
    exact = rows.double().square().sum(0)
    torch.testing.assert_close(norms.squared_norms().double(), exact, rtol=1e-5, atol=0)


def test_norms_are_gathered_where_they_are_cheaper_and_have_the_same_bits() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [SquaredNorms.suits(width, torch.float32, cpu) for width in (256, 511, 512, 9000)] == [
        False,
        False,
        True,
        True,
    ]
    assert [SquaredNorms.suits(width, torch.bfloat16, cuda) for width in (4095, 4096)] == [False, True]
    assert not SquaredNorms.suits(9000, torch.float32, cuda)


def test_what_methods_need() -> None:
    needs = {"magnitude": Need.NOTHING, "wanda": Need.NORMS, "sparsegpt": Need.GRAM, "thanos": Need.GRAM}
    for method, need in needs.items():
        assert need_of(LayerRecipe(method=method)) is need
        assert need_of(LayerRecipe(method=method, outlier_rows=0.1)) is Need.GRAM  # ranked by W H Wᵀ
    mixed = [LayerRecipe(method="magnitude"), LayerRecipe(method="wanda")]
    assert need_of_all(mixed, None) is need_of_all(mixed, False) is Need.NORMS
    assert need_of_all(mixed, True) is Need.GRAM
    assert need_of_all([], None) is Need.NOTHING


@pytest.mark.parametrize(
    ("need", "sample", "whole", "sampled"),
    [
        (Need.GRAM, True, ["Gram"], []),
        (Need.NORMS, True, ["SquaredNorms"], ["Gram"]),
        (Need.NORMS, False, ["SquaredNorms"], []),
        (Need.NOTHING, True, [], ["Gram"]),
        (Need.NOTHING, False, [], []),
    ],
)
def test_only_what_is_needed_is_gathered_and_a_sample_of_the_rest(
    need: Need, sample: bool, whole: list[str], sampled: list[str]
) -> None:
    a = linear("a", 512)
    x, y = torch.randn(5, 512), torch.randn(7, 512)
    with gather([a], need, sample=sample) as groups:
        a.module(x)
        groups.sampling = False
        a.module(y)
    (group,) = groups
    assert [type(one).__name__ for one in group.whole] == whole
    assert [type(one).__name__ for one in group.sample] == sampled
    assert group.tokens == 12
    assert [one.tokens for one in group.accumulators] == [12] * len(whole) + [5] * len(sampled)
    if group.gram is not None:
        rows = torch.cat([x, y]) if need is Need.GRAM else x
        torch.testing.assert_close(group.hessian, rows.T @ rows, rtol=1e-4, atol=1e-4)
    if group.norms is not None:
        torch.testing.assert_close(group.norms.squared_norms(), torch.cat([x, y]).square().sum(0))


def test_xtx_is_gathered_where_norms_would_cost_as_much() -> None:
    a = linear("a", 511)
    with gather([a], Need.NORMS) as groups:
        a.module(torch.randn(5, 511))
    assert (groups[0].norms, groups[0].sample) == (None, ())
    assert groups[0].hessian.shape == (511, 511)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_bad_activations_are_named(bad: float) -> None:
    layer = linear("model.layers.7.mlp.down_proj")
    x = torch.randn(5, 4)
    x[2, 1] = bad
    with gather([layer]) as groups:
        layer.module(x)
    with pytest.raises(
        NumericsError, match=r"inputs of model\.layers\.7\.mlp\.down_proj hold NaN or infinity"
    ) as caught:
        check_finite(groups)
    assert isinstance(caught.value, UserError)
    assert "--dtype" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_finite_statistics_pass() -> None:
    check_finite([InputGroup([linear("a")], (Gram(torch.full((4, 4), 3e38)),))])
    check_finite([])


def test_the_first_bad_input_of_several_is_named() -> None:
    bad = torch.full((4, 4), float("nan"))
    groups = [InputGroup([linear(name)], (Gram(sums),)) for name, sums in (("a", torch.eye(2)), ("b", bad), ("c", bad))]
    with pytest.raises(NumericsError, match="the inputs of b hold"):
        check_finite(groups)


# --- several passes -----------------------------------------------------------------------------------------------------


def expert_layers(experts: int) -> list[LinearLayer]:
    shapes = {"gate_proj": (10, 30), "up_proj": (10, 30), "down_proj": (30, 10)}
    return [
        LinearLayer(f"mlp.experts.{index}.{kind}", nn.Linear(columns, rows), 0, False)
        for index in range(experts)
        for kind, (rows, columns) in shapes.items()
    ]


@pytest.mark.parametrize(("per_pass", "expected"), [(0.5, 8), (1, 8), (2, 4), (3, 3), (8, 1), (100, 1)])
def test_layers_are_divided_so_that_their_hessians_fit(per_pass: float, expected: int) -> None:
    layers = expert_layers(8)
    one = 4 * (30**2 + 10**2)  # gate and up share theirs
    passes = plan_passes(layers, int(per_pass * one))
    assert [layer for part in passes for layer in part] == layers
    assert len(passes) == expected
    for part in passes:
        assert len(part) % 3 == 0  # what shares an input is not divided
        assert len(part) // 3 <= max(1, per_pass)


def test_no_layers_make_one_empty_pass() -> None:
    assert plan_passes([], 100) == [[]]
