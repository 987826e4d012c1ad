"""An oracle for whole models: every layer is pruned on its inputs in the model pruned so far."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

import thanos
from helpers import packed_windows

SAMPLES, LENGTH = 4, 32  # windows longer than the sliding window of 24


def calibration_ids(folder: Path, text: Path) -> Tensor:
    return packed_windows(AutoTokenizer.from_pretrained(folder), text.read_text(), SAMPLES, LENGTH)


def prune_modules(
    model: Any,
    modules: dict[str, nn.Module],
    ids: Tensor,
    stored: dict[str, Tensor],
    follow: dict[str, Tensor] | None,
    **how: Any,
) -> None:
    """Prune some layers of the model, all on their current inputs, and put the pruned weights into ``stored``.

    The model continues with the weights of ``follow`` if given, else with the pruned ones.
    """
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1]).double()
            sums[name] = sums.get(name, 0) + x.T @ x

        return see

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    for name, module in modules.items():
        transposed = not isinstance(module, nn.Linear)
        weight = stored[f"{name}.weight"]
        pruned = thanos.prune_weight(weight.T if transposed else weight, sums[name], **how).weight
        stored[f"{name}.weight"] = pruned.T.contiguous() if transposed else pruned
        with torch.no_grad():
            module.weight.copy_((follow or stored)[f"{name}.weight"])


def recipe(text: Path, **changes: Any) -> thanos.Recipe:
    return thanos.Recipe(
        **{"calibration": str(text), "samples": SAMPLES, "sequence_length": LENGTH, "device": "cpu"} | changes
    )


def compare(written: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float = 1e-4, ties: int = 0) -> None:
    """Assert equal masks, except for ``ties`` entries a layer, and weights within the tolerance."""
    for name, weight in expected.items():
        got = written[name]
        assert got.dtype == weight.dtype, name
        assert (got == 0).sum() == (weight == 0).sum(), name
        differ = int(((got == 0) != (weight == 0)).sum())
        assert differ <= ties, f"{name}: {differ} of {weight.numel()} differ"
        if not differ:
            error = (got.double() - weight.double()).norm() / weight.double().norm()
            assert error < tolerance, f"{name}: {error:.1e}"
