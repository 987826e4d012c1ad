"""Which blocks go: the choice against brute force on whole models, and its rules on made-up effects."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import thanos
from helpers import MIXTURES, save_tiny, windows
from shrinking import blocks_of, load, skip
from thanos.calibration.windows import Calibration
from thanos.run.block_choice import CANDIDATES, chosen_blocks, work_of
from whole_models import LENGTH, recipe

BLOCKS = 5


def divergence(folder: Path, architecture: str, gone: Sequence[int], ids: Tensor) -> float:
    """Mean over all tokens of KL(dense ‖ model whose blocks ``gone`` hand on their inputs), by transformers in float64.

    Experts run in float32: torch's product over them has no other dtype.
    """
    dtype = torch.float32 if architecture in MIXTURES else torch.float64
    with torch.inference_mode():
        dense, cut = load(folder).to(dtype), load(folder).to(dtype)
        _, blocks = blocks_of(cut, architecture)
        for index in gone:
            skip(blocks[index])
        wanted, found = (
            model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1) for model in (dense, cut)
        )
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@pytest.mark.parametrize("architecture", ["llama", "gemma-2", "gemma-3", "gpt-2", "gpt-neox", "mixtral"])
def test_the_block_whose_removal_changes_the_outputs_least_goes_and_then_the_next(
    architecture: str, text_file: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"n_layer": BLOCKS} if architecture == "gpt-2" else {"num_hidden_layers": BLOCKS}
    if architecture == "gemma-3":
        changes["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"] * 2
        changes["layer_types"].pop()
    dense = save_tiny(tmp_path / "model", architecture, **changes)
    ids = windows(3, LENGTH)
    given = Calibration(ids, str(text_file), "packed", 0, 1)
    made = recipe(text_file, pattern="blocks", sparsity=0.4, samples=3)
    cut = thanos.prune(dense, tmp_path / "out", made, calibration=given).cut
    gone: list[int] = []
    for found in cut["split"]["rounds"]:
        left = [index for index in range(1, BLOCKS) if index not in gone]
        expected = {index: divergence(dense, architecture, [*gone, index], ids) for index in left}
        assert {int(index): value for index, value in found["divergence"].items()} == pytest.approx(expected, rel=1e-3)
        assert found["removed"] == min(expected, key=expected.__getitem__)
        gone.append(found["removed"])
    assert cut["dropped_blocks"] == sorted(gone)
    assert len(gone) == 2


@pytest.mark.parametrize(("dropped", "warns"), [([1], True), ([2, 3], False)])
def test_a_run_warns_if_kinds_of_attention_no_longer_follow_from_the_number_of_a_block(
    dropped: list[int], warns: bool, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = save_tiny(tmp_path / "model", "gemma-2", num_hidden_layers=4)
    kinds = json.loads((dense / "config.json").read_text())["layer_types"]
    assert kinds == ["sliding_attention", "full_attention"] * 2
    monkeypatch.setattr("thanos.run.allocation.chosen_blocks", lambda *_: {"dropped": dropped})
    made = recipe(text_file, pattern="blocks", sparsity=len(dropped) / 4)
    report = thanos.prune(dense, tmp_path / "out", made)
    assert any("other kinds in layer_types" in line for line in report.warnings) == warns
    written = json.loads((tmp_path / "out/config.json").read_text())["layer_types"]
    assert written == [kind for index, kind in enumerate(kinds) if index not in dropped]


@pytest.mark.parametrize(
    ("scalar", "pattern", "warns"), [(8, "blocks", False), (24, "blocks", True), (24, "neurons", False)]
)
def test_a_run_warns_if_the_scale_of_attention_cannot_be_told_from_the_sizes(
    scalar: int, pattern: str, warns: bool, text_file: Path, tmp_path: Path
) -> None:
    dense = save_tiny(tmp_path / "model", "gemma-2", query_pre_attn_scalar=scalar, head_dim=8)
    made = recipe(text_file, pattern=pattern, sparsity=0.5, **({} if pattern == "blocks" else {"multiple_of": 8}))
    report = thanos.prune(dense, tmp_path / "out", made)
    assert any(line.startswith("query_pre_attn_scalar is 24") for line in report.warnings) == warns


def test_a_removal_is_measured_again_once_another_block_has_gone() -> None:
    """Blocks 2 and 3 matter little alone and much together; the second to go is 4, which was third."""
    alone = {1: 9.0, 2: 1.0, 3: 2.0, 4: 3.0}
    asked: list[tuple[list[int], list[int]]] = []

    def measure(gone: Sequence[int], candidates: Sequence[int]) -> dict[int, float]:
        asked.append((list(gone), list(candidates)))
        return {block: alone[block] + (50.0 if {*gone, block} >= {2, 3} else 0.0) for block in candidates}

    found = chosen_blocks(range(5), 2, measure)
    assert found["dropped"] == [2, 4]
    assert [one["removed"] for one in found["rounds"]] == [2, 4]
    assert found["rounds"][1]["divergence"] == {"1": 9.0, "3": 52.0, "4": 3.0}
    assert asked == [([], [1, 2, 3, 4]), ([2], [1, 3, 4])]


def test_later_rounds_measure_the_nearest_candidates_alone() -> None:
    calls: list[list[int]] = []

    def measure(gone: Sequence[int], candidates: Sequence[int]) -> dict[int, float]:
        calls.append(list(candidates))
        return {block: float(30 - block + len(gone)) for block in candidates}

    found = chosen_blocks(range(30), 3, measure)
    assert found["dropped"] == [27, 28, 29]
    assert calls[0] == list(range(1, 30))
    assert [len(one) for one in calls[1:]] == [CANDIDATES, CANDIDATES]
    assert calls[1] == list(range(29 - CANDIDATES, 29))


@pytest.mark.parametrize(("blocks", "number"), [(5, 2), (30, 5), (4, 3)])
def test_the_forecast_counts_the_work(blocks: int, number: int) -> None:
    """With candidates that lie at both ends alike, so that their mean depth is half."""
    forwards = comparisons = passes = 0

    def measure(gone: Sequence[int], candidates: Sequence[int]) -> dict[int, float]:
        nonlocal forwards, comparisons, passes
        left = [block for block in range(blocks) if block not in gone]
        passes, comparisons = passes + 1, comparisons + len(candidates)
        forwards += sum(len(left) - 1 - left.index(block) for block in candidates)
        return {block: abs(block - blocks / 2) for block in candidates}

    chosen_blocks(range(blocks), number, measure)
    work = work_of(blocks, number)
    assert (work.passes, work.comparisons, work.streams) == (passes, comparisons, blocks - 1)
    assert work.forwards == pytest.approx(forwards, rel=0.2, abs=2)
