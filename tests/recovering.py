"""Runs of recovery on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

import thanos

SAMPLES, LENGTH = 10, 32


def settings(text: Path, **changes: Any) -> thanos.RecoveryRecipe:
    """Three epochs of two steps; the last two of ten sequences are held out."""
    values = {"samples": SAMPLES, "sequence_length": LENGTH, "device": "cpu", "epochs": 3, "rate": 1e-3}
    return thanos.RecoveryRecipe(**{"calibration": str(text), **values} | changes)


def prune(dense: Path, out: Path, text: Path, **changes: Any) -> Path:
    """Prune a model, to 50 % unless the changes say otherwise; return the output folder."""
    values = {"calibration": str(text), "samples": 4, "sequence_length": LENGTH, "device": "cpu"}
    thanos.prune(dense, out, thanos.Recipe(**values | changes))
    return out


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}
