"""A recovery on two processes gives the result of one, to rounding: with copies of the model and with shards (FSDP)."""

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
from helpers import ROOT
from recovering import read, settings
from thanos.errors import RecipeError
from thanos.recovery.setup import check_shard, check_split
from thanos.recovery.states import RecoveryFolder

pytest.importorskip("accelerate", reason="the extra recover is not installed")


def torchrun(job: dict[str, Any]) -> int:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(ROOT / "tests" / "recovering_ranks.py"), json.dumps(job)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([*command, *script], env=environment, capture_output=True, text=True, timeout=600)
    assert "warning" not in done.stderr.lower(), done.stderr
    return done.returncode


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True], ids=["copies", "shards"])
def test_two_processes_interrupted_and_resumed_give_the_result_of_one(
    shard: bool,
    recovered: tuple[Path, thanos.RecoveryReport],
    pruned: Path,
    tiny_llama: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    out, recipe = tmp_path / "out2", settings(text_file, shard=shard)
    job = {"model": str(pruned), "out": str(out), "dense": str(tiny_llama), "settings": recipe.to_dict(), "stop": 5}
    assert torchrun(job) != 0
    assert RecoveryFolder(out).finished == 4
    assert torchrun(job | {"stop": 0}) == 0
    whole, expected = recovered
    report = thanos.RecoveryReport.from_dict(json.loads((out / "recovery.json").read_bytes()))
    assert report.best_step == expected.best_step
    for entry, other in zip(report.history, expected.history, strict=True):
        assert entry["held_out"] == pytest.approx(other["held_out"], rel=1e-3)
    before, one = read(pruned), read(whole)
    for name, tensor in read(out).items():
        assert torch.equal(tensor == 0, before[name] == 0) or not name.endswith("_proj.weight"), name
        moved = (one[name] - before[name]).abs().max()
        assert (tensor - one[name]).abs().mean() < 2e-3 * moved, name
    assert [path.name for path in tmp_path.iterdir()] == ["out2"]


def test_a_batch_must_divide(text_file: Path) -> None:
    check_split(settings(text_file), 4)
    with pytest.raises(
        RecipeError, match="a batch of 4 cannot be split over 3 processes; give --batch a multiple of 3"
    ):
        check_split(settings(text_file), 3)
    with pytest.raises(RecipeError, match="over 4 processes in micro-batches of 2; give --batch a multiple of 8"):
        check_split(settings(text_file, micro_batch=2), 4)


def test_shards_need_cuda(text_file: Path) -> None:
    check_shard(settings(text_file, shard=True), torch.device("cuda"))
    with pytest.raises(RecipeError, match="shard needs CUDA devices; leave --shard out"):
        check_shard(settings(text_file, shard=True), torch.device("cpu"))
