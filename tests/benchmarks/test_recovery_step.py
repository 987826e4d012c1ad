"""The benchmark of a recovery's step: it times both ways, and its steps keep the zeros."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from helpers import benchmark_script, save_tiny

pytest.importorskip("accelerate", reason="the extra recover is not installed")


@pytest.mark.slow
def test_it_times_steps_without_and_with_the_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, folder = benchmark_script("recovery_step"), save_tiny(tmp_path / "model")
    options = ["--sequences", "2", "--length", "16", "--steps", "2", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["recovery_step.py", str(folder), *options])
    assert script.main() == 0
    plain, faster = map(json.loads, capsys.readouterr().out.splitlines())
    assert (plain["compiled"], faster["compiled"]) == (False, True)
    for row in (plain, faster):
        assert row["tokens_per_second"] == pytest.approx(32 / row["step_seconds"])
        assert row["notes"] == []


def test_the_steps_train_and_keep_the_zeros(tmp_path: Path) -> None:
    script, device = benchmark_script("recovery_step"), torch.device("cpu")
    module, masks = script.random_pair(str(save_tiny(tmp_path / "model")), device)
    before = {name: module.student.get_parameter(name).detach().clone() for name in masks}
    script.timed(module, masks, Namespace(sequences=2, length=16, steps=2), device)
    for name, mask in masks.items():
        after = module.student.get_parameter(name).detach()
        assert not after[~mask].any(), name
        assert (after != before[name])[mask].any(), name
