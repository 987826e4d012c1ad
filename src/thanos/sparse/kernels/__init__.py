"""Kernels for products of packed matrices, and the check whether a device has one."""

from __future__ import annotations

import torch


def lacking(device: torch.device) -> str:
    """Return the reason why a device has no kernel for packed weights; empty if it has one."""
    if device.type == "cuda":
        from thanos.sparse.kernels import cuda

        return cuda.lacking(device)
    if device.type == "cpu":
        from thanos.sparse.kernels import cpu

        return cpu.lacking()
    return f"there is no kernel for the device {device.type}"
