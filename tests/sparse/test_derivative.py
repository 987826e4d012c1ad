"""Gradients of packed products, against float64, and products under autocast."""

from __future__ import annotations

import pytest
import torch

from sparse_matrices import DEVICES, assert_close, on, product, random_weight, sparse_weight
from thanos.sparse.encoding import encode
from thanos.sparse.ops import packed_linears


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 40])
def test_autocast_to_another_dtype_changes_no_value(tokens, device):
    """The values stay bfloat16: some of these overflow float16."""
    packed = on(encode(sparse_weight(64, 96)), device)
    x = torch.full((tokens, 96), 1e6).bfloat16().to(device).requires_grad_()
    expected = product(packed, x)
    with torch.autocast(device, torch.float16):
        got = product(packed, x)
        (slope,) = torch.autograd.grad(got, x, torch.full_like(got, 1e6))
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, expected)
    assert slope.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bitmap", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("tokens", [1, 40])
def test_gradients_by_input_and_bias_are_those_of_the_dense_product(tokens, compiled, bitmap, device):
    draw = torch.Generator().manual_seed(4)
    weight = random_weight(64, 96, 0.7) if bitmap else sparse_weight(64, 96)
    packed = on(encode(weight), device)
    x, bias, grad = (
        torch.randn(*size, generator=draw).bfloat16().to(device) for size in ((tokens, 96), (64,), (tokens, 64))
    )
    x.requires_grad_()
    bias.requires_grad_()

    def two(x: torch.Tensor, bias: torch.Tensor) -> list[torch.Tensor]:
        return packed_linears(x, [packed.words] * 2, [packed.offsets] * 2, [bias, None], [64] * 2, packed.spec.n)

    torch._dynamo.reset()
    run = torch.compile(two, backend="aot_eager", fullgraph=True) if compiled else two
    outputs = run(x, bias)
    torch.autograd.backward(outputs, [grad, grad])
    assert_close(outputs[0].detach(), weight, x.detach(), bias.detach())
    assert x.grad is not None
    assert bias.grad is not None
    exact = 2 * grad.double().cpu() @ weight.double()
    assert torch.allclose(x.grad.double().cpu(), exact, rtol=2**-6, atol=1e-2)
    assert torch.allclose(bias.grad.double().cpu(), grad.double().cpu().sum(0), rtol=2**-6, atol=1e-1)


def test_a_second_derivative_is_refused():
    packed = encode(sparse_weight(64, 96))
    x = torch.randn(2, 96).bfloat16().requires_grad_()
    (first,) = torch.autograd.grad(product(packed, x).float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.float().sum().backward()
