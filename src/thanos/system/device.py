"""The choice of the device that a run uses."""

from __future__ import annotations

import torch

from thanos.errors import CudaUnavailableError, ResourceError
from thanos.system.suggestions import near_device


def choose_device(name: str) -> torch.device:
    """Return the device for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        CudaUnavailableError: the name requires CUDA, and torch reports no CUDA device.
        ResourceError: the name is none of these, or the device does not exist.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if (
        kind not in ("cpu", "cuda")
        or (index and not (index.isascii() and index.isdigit()))
        or (kind == "cpu" and index)
        or name.endswith(":")
    ):
        raise ResourceError(
            f"device {name!r} is unknown; choose auto, cpu, cuda or cuda:N, such as cuda:0{near_device(name)}"
        )
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise CudaUnavailableError(f"device {name} needs CUDA, but torch finds no CUDA device; use --device cpu")
        if index and int(index) >= torch.cuda.device_count():
            raise ResourceError(
                f"device {name} does not exist; there are cuda:0 to cuda:{torch.cuda.device_count() - 1}"
            )
    return torch.device(name)
