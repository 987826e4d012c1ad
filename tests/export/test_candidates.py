"""What a user reads if no layer of a model can be packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import save_tiny
from sparse_matrices import save_pruned
from thanos.errors import ModelError
from thanos.export.pack import pack


@pytest.mark.parametrize(
    ("architecture", "dtype", "least_weights", "words"),
    [
        ("llama", torch.bfloat16, 1 << 16, r"22 of 22 layers: too small: .*; lower --least-weights$"),
        ("llama", torch.float32, 1, r"22 of 22 layers: float32: .*; prune it first, .* --output-dtype bfloat16$"),
        ("gpt-2", torch.bfloat16, 1, r"12 of 13 layers: stored transposed\)$"),  # the other one is the head
    ],
)
def test_a_pruned_model_is_not_told_to_be_pruned(
    tmp_path: Path, architecture: str, dtype: Any, least_weights: int, words: str
) -> None:
    source = save_pruned(tmp_path / "model", architecture, dtype=dtype)
    with pytest.raises(ModelError, match=words):
        pack(source, tmp_path / "packed", least_weights=least_weights)
    assert not (tmp_path / "packed").exists()


def test_a_dense_model_is_to_be_pruned_first(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", dtype=torch.bfloat16)
    with pytest.raises(ModelError, match=r"too dense: .*; prune it first, for example with --pattern 16:32$"):
        pack(source, tmp_path / "packed", least_weights=1)
