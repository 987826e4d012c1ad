"""A recovery on a GPU: float32 weights, bfloat16 products, the same zeros and files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import thanos
from helpers import ROOT, save_tiny
from recovering import VARIED, prune, read, settings
from thanos.recovery.distance import Distillation

pytest.importorskip("accelerate", reason="the extra recover is not installed")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_recovery_on_a_gpu(
    dtype: torch.dtype, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = save_tiny(tmp_path / "dense", dtype=dtype)
    pruned = prune(dense, tmp_path / "out", text_file, pattern="2:4")
    kinds: set[tuple[torch.dtype, torch.dtype]] = set()
    original = Distillation.forward

    def watch(self: Distillation, *args: torch.Tensor) -> torch.Tensor:
        layer = self.student.get_submodule("model.layers.0.mlp.up_proj")
        hidden = torch.ones(1, layer.get_parameter("weight").shape[1], device="cuda")
        kinds.add((layer.get_parameter("weight").dtype, layer(hidden).dtype))
        return original(self, *args)

    monkeypatch.setattr(Distillation, "forward", watch)
    recipe = settings(text_file, device="cuda", rate=1e-3)
    report = thanos.recover(pruned, tmp_path / "out2", dense=dense, recipe=recipe)
    assert kinds == {(torch.float32, torch.bfloat16)}
    assert report.held_out_after < report.held_out_before
    before, after = read(pruned), read(tmp_path / "out2")
    for name, tensor in after.items():
        assert tensor.dtype == dtype
        if name.endswith("_proj.weight"):
            assert not ((before[name] == 0) & (tensor != 0)).any(), name
    monkeypatch.undo()  # the layers of the next run are on the CPU
    on_cpu = thanos.recover(pruned, tmp_path / "cpu", dense=dense, recipe=settings(text_file, rate=1e-3))
    for entry, other in zip(report.history, on_cpu.history, strict=True):
        assert entry["held_out"] == pytest.approx(other["held_out"], rel=0.05)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("shard", [False, True], ids=["copies", "shards"])
def test_two_gpus_give_the_result_of_one(shard: bool, text_file: Path, tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "dense")
    pruned = prune(dense, tmp_path / "out", text_file, pattern="2:4")
    one = thanos.recover(pruned, tmp_path / "one", dense=dense, recipe=settings(text_file, device="cuda:0"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "thanos"]
    command += ["recover", str(pruned), str(tmp_path / "two"), "--dense", str(dense), "--calibration", str(text_file)]
    command += ["--samples", "10", "--sequence-length", "32", "--epochs", "3", "--rate", "1e-3"]
    command += ["--train", "all", "--no-vary"]
    command += ["--shard"] if shard else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    two = thanos.RecoveryReport.from_dict(json.loads((tmp_path / "two" / "recovery.json").read_bytes()))
    for entry, other in zip(two.history, one.history, strict=True):
        assert entry["held_out"] == pytest.approx(other["held_out"], rel=0.02)
    assert two.best_step > 0
    before = read(pruned)
    for name, tensor in read(tmp_path / "two").items():
        if name.endswith("_proj.weight"):
            assert not ((before[name] == 0) & (tensor != 0)).any(), name


@pytest.mark.parametrize("changes", [{}, VARIED], ids=["same", "varied"])
def test_an_interrupted_recovery_on_a_gpu_goes_on(changes: dict[str, Any], text_file: Path, tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "dense")
    pruned, recipe = prune(dense, tmp_path / "out", text_file), settings(text_file, device="cuda:0", **changes)

    def stop(event: thanos.Event) -> None:
        if event.phase == "train" and event.kind == "progress" and event.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        thanos.recover(pruned, tmp_path / "out2", dense=dense, recipe=recipe, on_event=stop)
    report = thanos.recover(pruned, tmp_path / "out2", dense=dense, recipe=recipe, resume=True)
    whole = thanos.recover(pruned, tmp_path / "whole", dense=dense, recipe=recipe)
    for entry, other in zip(report.history, whole.history, strict=True):
        assert entry["held_out"] == pytest.approx(other["held_out"], rel=1e-2)
