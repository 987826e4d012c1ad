"""Two processes with a GPU each, joined by NCCL: the result of one process, an end in order, one line if a process dies."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import thanos
from helpers import prose, save_tiny
from launching import error_lines, torchrun

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

SETTINGS: dict[str, Any] = {"samples": 10, "sequence_length": 32, "device": "cuda"}


def words(dense: Path, out: Path, text: Path) -> list[Any]:
    options = [word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", value)]
    return ["prune", dense, out, "--calibration", text, *options, "--quiet"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(prose(4000, seed=1), encoding="utf-8")
    return path


@pytest.mark.parametrize("architecture", ["llama", "olmoe"])
def test_two_gpus_prune_like_one(architecture: str, text: Path, tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "model", architecture)
    report = thanos.prune(dense, tmp_path / "one", thanos.Recipe(calibration=str(text), **SETTINGS))
    run = torchrun(2, ["-m", "thanos"], words(dense, tmp_path / "two", text))
    assert run.returncode == 0, run.stderr
    assert len(re.findall("written to", run.stdout)) == 1
    assert error_lines(run) == []
    for sign in ("terminate called", "destroy_process_group", "Traceback", "SIGABRT"):
        assert sign not in run.stderr, run.stderr
    found = thanos.PruningReport.read(tmp_path / "two/pruning.json")
    assert [(layer.name, layer.tokens) for layer in found.layers] == [
        (layer.name, layer.tokens) for layer in report.layers
    ]
    assert found.totals["zeros_all"] == report.totals["zeros_all"]
    expected, written = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert written.keys() == expected.keys()
    for name, weight in expected.items():
        differ = int(((weight == 0) != (written[name] == 0)).sum())
        assert differ <= 4, name  # scores at the threshold: sums over two processes round differently
        if not differ:
            torch.testing.assert_close(written[name], weight, rtol=1e-2, atol=1e-3)


_DIES = """
import os, signal
from thanos.cli import main
from thanos.engine.stages.prune import PruneStage

def dying(self, context, *arguments):
    if os.environ["RANK"] == os.environ["DIES"] and context.index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    yield from solve(self, context, *arguments)

solve, PruneStage._solve = PruneStage._solve, dying
main()
"""


@pytest.mark.parametrize("dies", [0, 1])
def test_a_process_that_dies_ends_both_with_one_line_and_one_gpu_goes_on(dies: int, text: Path, tmp_path: Path) -> None:
    dense, out = save_tiny(tmp_path / "model", "llama"), tmp_path / "out"
    (tmp_path / "dies.py").write_text(_DIES)
    run = torchrun(2, [str(tmp_path / "dies.py")], words(dense, out, text), DIES=str(dies))
    assert run.returncode != 0
    (line,) = error_lines(run)
    assert "another process" in line
    assert "--resume" in line
    assert not out.exists()
    thanos.prune(dense, out, thanos.Recipe(calibration=str(text), **SETTINGS), resume=True)
    assert (out / "pruning.json").exists()
    assert not (tmp_path / ".out.partial").exists()
