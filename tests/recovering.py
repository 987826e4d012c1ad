"""Runs of recovery on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import thanos

SAMPLES, LENGTH = 10, 32

VARIED = {"train": "auto", "vary": True}
"""The defaults, which :func:`settings` changes."""


def settings(text: Path, **changes: Any) -> thanos.RecoveryRecipe:
    """All parameters for three epochs of two steps on the same text; the last two of ten sequences are held out."""
    values = {"samples": SAMPLES, "sequence_length": LENGTH, "device": "cpu", "epochs": 3, "rate": 1e-3}
    values |= {"train": "all", "vary": False}
    return thanos.RecoveryRecipe(**{"calibration": str(text), **values} | changes)


def vary(rows: list[list[int]], bos: tuple[int, ...], draw: torch.Generator) -> list[list[int]]:
    """The varied text of an epoch, token by token: a reference that uses no operation on tensors but the draws."""
    begin = list(bos)
    stream = [token for row in rows for token in row[len(begin) :]]
    length, total = len(rows[0]) - len(begin), len(stream)
    offset = int(torch.randint(total, (), generator=draw))
    stream = [stream[(position - offset) % total] for position in range(total)]
    size = min(256, length)
    segments = [stream[first : first + size] for first in range(0, total, size)]
    order = torch.randperm(len(segments), generator=draw).tolist()
    stream = [token for number in order for token in segments[number]]
    chances = torch.rand(total, generator=draw).tolist()
    sources = torch.randint(total, (total,), generator=draw).tolist()
    stream = [
        stream[source] if chance < 0.05 else stream[i]
        for i, (chance, source) in enumerate(zip(chances, sources, strict=True))
    ]
    return [begin + stream[first : first + length] for first in range(0, total, length)]


def prune(dense: Path, out: Path, text: Path, **changes: Any) -> Path:
    """Prune a model, to 50 % unless the changes say otherwise; return the output folder."""
    values = {"calibration": str(text), "samples": 4, "sequence_length": LENGTH, "device": "cpu"}
    thanos.prune(dense, out, thanos.Recipe(**values | changes))
    return out


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}
