"""Skips the tests on a device that is not there."""

from __future__ import annotations

import pytest
import torch

from thanos.sparse.kernels import lacking


@pytest.fixture(autouse=True)
def _device_is_there(request: pytest.FixtureRequest) -> None:
    callspec = getattr(request.node, "callspec", None)
    if callspec and callspec.params.get("device") == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        reason = lacking(torch.device("cuda", 0))
        assert not reason
