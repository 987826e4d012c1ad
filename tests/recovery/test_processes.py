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
from recovering import VARIED, read, settings
from thanos.errors import RecipeError
from thanos.recovery.setup import check_shard, check_split
from thanos.recovery.states import RecoveryFolder

pytest.importorskip("accelerate", reason="the extra recover is not installed")


def launch(words: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run([*command, *words], env=environment, capture_output=True, text=True, timeout=900)


def torchrun(job: dict[str, Any]) -> int:
    done = launch([str(ROOT / "tests" / "recovering_ranks.py"), json.dumps(job)])
    assert "warning" not in done.stderr.lower(), done.stderr
    return done.returncode


@pytest.mark.slow
@pytest.mark.parametrize("run", ["recovered", "varied"])
@pytest.mark.parametrize("shard", [False, True], ids=["copies", "shards"])
def test_two_processes_interrupted_and_resumed_give_the_result_of_one(
    shard: bool,
    run: str,
    request: pytest.FixtureRequest,
    pruned: Path,
    tiny_llama: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    whole, expected = request.getfixturevalue(run)
    out, recipe = tmp_path / "out2", settings(text_file, shard=shard, **(VARIED if run == "varied" else {}))
    job = {"model": str(pruned), "out": str(out), "dense": str(tiny_llama), "settings": recipe.to_dict(), "stop": 5}
    assert torchrun(job) != 0
    assert RecoveryFolder(out).finished == 4
    assert torchrun(job | {"stop": 0}) == 0
    report = thanos.RecoveryReport.from_dict(json.loads((out / "recovery.json").read_bytes()))
    assert report.best_step == expected.best_step
    for entry, other in zip(report.history, expected.history, strict=True):
        assert entry["held_out"] == pytest.approx(other["held_out"], rel=1e-3)
    before, one = read(pruned), read(whole)
    for name, tensor in read(out).items():
        assert torch.equal(tensor == 0, before[name] == 0) or not name.endswith("_proj.weight"), name
        moved = (one[name] - before[name]).abs().max()
        assert (tensor - one[name]).abs().mean() <= 2e-3 * moved, name
    assert [path.name for path in tmp_path.iterdir()] == ["out2"]


@pytest.mark.slow
def test_the_command_on_two_processes(
    recovered: tuple[Path, thanos.RecoveryReport], pruned: Path, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    """One process speaks; a mistake is one line and exit code 2 there too, and nothing is written."""
    words = ["-m", "thanos", "recover", str(pruned), str(tmp_path / "out2"), "--dense", str(tiny_llama)]
    words += ["--calibration", str(text_file), "--device", "cpu", "--samples", "10", "--sequence-length", "32"]
    words += ["--train", "all", "--no-vary"]
    done = launch([*words, "--epochs", "3", "--rate", "1e-3", "--batch", "3"])
    assert done.returncode != 0
    assert done.stderr.count("a batch of 3 cannot be split over 2 processes; give --batch a multiple of 2") == 1
    assert not list(tmp_path.iterdir())
    done = launch([*words, "--epochs", "3", "--rate", "1e-3"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    report = thanos.RecoveryReport.from_dict(json.loads((tmp_path / "out2" / "recovery.json").read_bytes()))
    assert report.best_step == recovered[1].best_step
    assert report.held_out_after == pytest.approx(recovered[1].held_out_after, rel=1e-3)


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
