"""Calibration ``self``: sequences that are sampled from the dense model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thanos.events import Event

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GENERATION_BATCH = 16
"""Number of sequences that the model generates together."""


def generate(
    model: PreTrainedModel,
    samples: int,
    length: int,
    seed: int,
    start: tuple[int, ...],
    pad: int,
    emit: Callable[[Event], None],
) -> Tensor:
    """Sample sequences from the model at temperature 1. Each begins with the tokens ``start``: BOS, else end-of-text."""
    batches = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode():
        torch.manual_seed(seed)
        for first in range(0, samples, GENERATION_BATCH):
            size = min(GENERATION_BATCH, samples - first)
            prompt = torch.tensor(start, device=model.device).repeat(size, 1)
            ids = model.generate(  # type: ignore[operator]
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=length - len(start),
                max_new_tokens=length - len(start),
                pad_token_id=pad,
            )
            batches.append(ids.cpu())
            emit(
                Event(
                    kind="progress",
                    phase="calibration",
                    done=first + size,
                    total=samples,
                    tokens=(first + size) * length,
                )
            )
    return torch.cat(batches)
