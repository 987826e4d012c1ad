"""Rates of this machine, measured in about a second: arithmetic by dtype, memory, and copies from host to device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from thanos.solvers.precision import full_float32

_SECONDS = 0.15
"""Minimum seconds for which one rate is measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Measured rates of a device.

    Attributes:
        model_flops: operations/s of a matrix product in the model's dtype.
        float32_flops: operations/s of a matrix product in full float32, in which layers are solved.
        gram_flops: operations/s of XᵀX in float32, for an (a, b) X in the model's dtype. It is counted as 2ab² operations, of
            which about half are executed.
        memory_bytes: bytes/s, read plus written, of a copy within the device's memory.
        to_device_bytes: bytes/s of a copy from host memory to the device; on the CPU, of a copy within host memory.
    """

    model_flops: float
    float32_flops: float
    gram_flops: float
    memory_bytes: float
    to_device_bytes: float

    def to_dict(self) -> dict[str, float]:
        """Return plain values."""
        return asdict(self)


@torch.inference_mode()
def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure the rates of a device, for a model that runs in ``dtype``."""
    from thanos.calibration.accumulators import add_gram

    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    x, y = (torch.randn(size, size, device=device) for _ in range(2))
    hessian = torch.zeros(size, size, device=device)
    host = torch.randn(32 << 20 if device.type == "cuda" else 4 << 20)
    there = torch.empty_like(host, device=device)
    wide = x if device.type == "cuda" else x.repeat(8, 1)  # larger than the caches
    copied = torch.empty_like(wide)
    product = 2.0 * size**3
    with full_float32():
        float32_flops = product / _seconds(lambda: x @ y, device)
    return Rates(
        model_flops=product / _seconds(lambda: a @ b, device),
        float32_flops=float32_flops,
        gram_flops=product / _seconds(lambda: add_gram(hessian, a), device),
        memory_bytes=2 * wide.nbytes / _seconds(lambda: copied.copy_(wide), device),
        to_device_bytes=host.nbytes / _seconds(lambda: there.copy_(host), device),
    )


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the mean seconds of one call, after a warm-up call. Calls are repeated until ``_SECONDS`` have passed."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    wait()
    count, began = 0, time.perf_counter()
    while True:
        for _ in range(max(1, count)):
            work()
        count += max(1, count)
        wait()
        spent = time.perf_counter() - began
        if spent >= _SECONDS:
            return spent / count
