"""What goes through the buffers comes out as it was, whatever its size, and never before it is there."""

from __future__ import annotations

import pytest
import torch

from thanos.system.background import Background
from thanos.system.staging import Staging

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64, 1001])
def test_values_go_and_come_back(device: str, dtype: torch.dtype, count: int) -> None:
    staging = Staging(torch.device(device), buffer_bytes=64)
    values = torch.arange(count).to(dtype)
    place = torch.full_like(values, -1, device=device)
    staging.fill(place, values)
    staging.wait()
    assert torch.equal(place.cpu(), values)
    assert torch.equal(staging.fetch(place), values)
    assert torch.equal(staging.fetch(place.expand(2, -1).T), values.expand(2, -1).T)


@pytest.mark.parametrize("device", DEVICES)
def test_values_are_rounded_as_a_plain_copy_rounds_them(device: str) -> None:
    staging, values = Staging(torch.device(device), buffer_bytes=64), torch.randn(999)
    place = torch.empty(999, dtype=torch.bfloat16, device=device)
    staging.fill(place, values)
    staging.wait()
    assert torch.equal(place.cpu(), values.to(torch.bfloat16))


@pytest.mark.parametrize("device", DEVICES)
def test_large_tensors_by_a_thread_and_by_its_maker(device: str) -> None:
    where = torch.device(device)
    staging, behind = Staging(where, buffer_bytes=1 << 16), Background("test", where)
    for seed in range(5):
        values = torch.randn(333, 1001, generator=torch.Generator().manual_seed(seed)).to(where)
        assert torch.equal(behind.submit(staging.fetch, values.mul(2)).result(), values.cpu() * 2)
        assert torch.equal(staging.fetch(values * 3), values.cpu() * 3)
    behind.close()
