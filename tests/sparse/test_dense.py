"""The layers of a packed model that stay dense: products with few tokens against float64, and the layers of a loaded model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparse_matrices import DTYPES, assert_close
from thanos.sparse.kernels import dense
from thanos.sparse.modules import DenseLinear, quicken
from thanos.sparse.ops import dense_linear

kernel = pytest.mark.skipif(dense._extension() is None, reason="no kernel for dense matrices on this machine")
SHAPES = [(1, 1), (3, 31), (5, 32), (7, 33), (33, 127), (64, 128), (50, 129), (20, 1000), (300, 96)]


def operands(
    shape: tuple[int, int], dtype: torch.dtype, tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(sum(shape) + tokens)
    weight, bias = torch.randn(*shape, generator=draw).to(dtype), torch.randn(shape[0], generator=draw).to(dtype)
    return torch.randn(tokens, shape[1], generator=draw).to(dtype), weight, bias


@kernel
@pytest.mark.parametrize("dot", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_computes_the_product(shape, dtype, dot):
    for tokens in range(1, dense.MOST_TOKENS + 1):
        x, weight, bias = operands(shape, dtype, tokens)
        assert dense.serves(x, weight)
        assert_close(dense.linear(x, weight, None, dot=dot), weight, x)
        assert_close(dense.linear(x, weight, bias, dot=dot), weight, x, bias)


@kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_has_the_same_bits_in_every_batch_and_with_every_number_of_threads(dtype):
    x, weight, bias = operands((1000, 300), dtype, 4)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            together = dense.linear(x.view(2, 2, 300), weight, bias).view(4, 1000)
            for token in range(4):
                assert together[token].equal(dense.linear(x[token], weight, bias))
    finally:
        torch.set_num_threads(before)


@kernel
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_reaches_every_row_that_reads_it(value):
    x, weight, _ = operands((40, 70), torch.bfloat16, 1)
    x[0, 69] = value
    weight[3, 69] = 0
    got = dense.linear(x, weight, None)
    assert got[0, 3].isnan()
    assert not got.isfinite().any()


@kernel
def test_rows_beyond_the_matrix_are_not_read():
    x, weight, _ = operands((8, 45), torch.bfloat16, 1)
    around = torch.full((10, 45), float("nan"), dtype=torch.bfloat16)
    around[1:9] = weight
    assert dense.linear(x, around[1:9], None).equal(dense.linear(x, weight, None))


def test_everything_else_is_left_to_the_library():
    x, weight, bias = operands((6, 40), torch.bfloat16, 5)
    assert not dense.serves(x, weight)  # more tokens than the kernel is faster for
    assert not dense.serves(x[:0], weight)
    assert not dense.serves(x[:1].float(), weight.float())
    assert not dense.serves(x[:1, :6], weight.T)
    assert not dense.serves(x[:1], weight, bias.float())
    assert not dense.serves(x[:1], weight, bias[:5])
    assert not dense.serves(x[:1, :39], weight)
    with pytest.raises(RuntimeError):
        dense_linear(x[:1, :39], weight, bias)
    assert dense_linear(x, weight, bias).equal(F.linear(x, weight, bias))
    assert dense_linear(x[:1, :6], weight.T, None).equal(F.linear(x[:1, :6], weight.T))


def test_the_operator_has_a_fake_that_compilers_can_use():
    x, weight, bias = operands((6, 40), torch.bfloat16, 1)
    torch.library.opcheck(
        torch.ops.thanos.dense_linear.default, (x, weight, bias), test_utils=["test_schema", "test_faketensor"]
    )


def test_layers_change_their_class_and_nothing_else():
    layer = nn.Linear(40, 6).bfloat16()
    model, parameters, x = nn.Sequential(layer), [*layer.parameters()], torch.randn(1, 40).bfloat16()
    quicken(model)
    assert type(layer) is DenseLinear
    assert all(one is other for one, other in zip(layer.parameters(), parameters, strict=True))
    model(x).sum().backward()  # a derivative is wanted
    assert layer.weight.grad is not None
    with torch.no_grad():
        assert_close(model(x), layer.weight.detach(), x, layer.bias.detach())
    quicken(model, on=False)
    assert type(layer) is nn.Linear


class Half(nn.Linear):
    """A layer of somebody else."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) / 2


def test_layers_of_other_classes_stay_as_they_are():
    model = nn.Sequential(Half(4, 4), nn.Linear(4, 4))
    quicken(model)
    assert [type(layer) for layer in model] == [Half, DenseLinear]


def test_a_layer_that_is_quantised_later_computes_with_its_quantised_weight():
    quantization = pytest.importorskip("torchao.quantization")
    draw = torch.Generator().manual_seed(0)
    layers = [nn.Linear(64, 32).bfloat16().requires_grad_(False) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    x, models = torch.randn(1, 64, generator=draw).bfloat16(), [nn.Sequential(layer) for layer in layers]
    quicken(models[1])
    for model in models:
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert type(layers[1]) is DenseLinear
    assert models[1](x).equal(models[0](x))
