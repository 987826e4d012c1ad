"""Patterns that belong to a whole model choose nothing in a single matrix."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from thanos.errors import RecipeError
from thanos.patterns.budget import Request
from thanos.registry import parse_pattern


def smallest_columns(scores: Tensor, count: int) -> Tensor:
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[scores.argsort()[:count]] = True
    return mask


def test_blocks_chooses_no_column() -> None:
    pattern = parse_pattern("blocks")
    request = Request(rows=4, columns=8, sparsity=0.0, outlier_rows=0.0, keep_budget=False)
    choice: Any = SimpleNamespace(budget=pattern.budget(request), smallest_columns=smallest_columns)
    assert not pattern.mask(choice, torch.rand(8)).any()


def test_width_names_the_patterns_of_a_matrix() -> None:
    with pytest.raises(RecipeError, match="for a single matrix give neurons, or heads:N"):
        parse_pattern("width").mask(None, torch.rand(8))  # type: ignore[arg-type]
