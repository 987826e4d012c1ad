"""Products over two streams against float64."""

from __future__ import annotations

import pytest
import torch

from thanos.calibration import accumulators
from thanos.calibration.accumulators import CrossGram
from thanos.calibration.statistics import InputGroup, Pairs, check_finite
from thanos.errors import NumericsError
from thanos.model.layers import LinearLayer

CPU = torch.device("cpu")
DEVICES = [CPU, *([torch.device("cuda")] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_of_two_streams_are_exact_in_float32(dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    cross, difference = CrossGram.empty(5, 7, device), CrossGram.empty(5, 7, device)
    wanted, less = torch.zeros(5, 7, dtype=torch.float64), torch.zeros(5, 7, dtype=torch.float64)
    for tokens in (1, 40, 300):
        left, right = (torch.randn(tokens, size, generator=generator).to(dtype) for size in (5, 7))
        other = (left.float() + 0.01 * torch.randn(tokens, 5, generator=generator)).to(dtype)
        cross.add(left.to(device), right.to(device))
        difference.add_difference(left.to(device), other.to(device), right.to(device))
        wanted += left.double().T @ right.double()
        less += (left.double() - other.double()).T @ right.double()
    assert cross.tokens == difference.tokens == 341
    torch.testing.assert_close(cross.sums.cpu().double(), wanted, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(difference.sums.cpu().double(), less, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_a_difference_of_wide_and_narrow_numbers_is_exact_in_float32(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The last writer before removed blocks: its wanted output has 16 bits, the output of the block's other layers has 32.
    monkeypatch.setattr(accumulators, "_is_sixteen_bit", lambda rows: rows.dtype == torch.bfloat16)  # as on CUDA
    generator = torch.Generator().manual_seed(2)
    dense, pruned, inputs = (torch.randn(40, size, generator=generator) for size in (5, 5, 7))
    dense, inputs = dense.bfloat16(), inputs.bfloat16()
    difference = CrossGram.empty(5, 7, device)
    difference.add_difference(dense.to(device), pruned.to(device), inputs.to(device))
    wanted = (dense.double() - pruned.double()).T @ inputs.double()
    torch.testing.assert_close(difference.sums.cpu().double(), wanted, rtol=1e-5, atol=1e-4)


def test_products_that_are_not_finite_are_refused_with_the_layers_name() -> None:
    layer = LinearLayer("block.o_proj", torch.nn.Linear(3, 2, bias=False), 0, False)
    group = InputGroup([layer], pairs=Pairs.empty([layer], {"block.o_proj"}, CPU))
    check_finite([group])
    assert group.pairs is not None
    group.pairs.residuals["block.o_proj"].sums[1, 2] = float("nan")
    with pytest.raises(NumericsError, match=r"block\.o_proj"):
        check_finite([group])
