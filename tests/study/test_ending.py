"""Processes that are ended from outside leave none behind: a study's workers with their children, and torchrun's."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from process_tree import left_of, offspring, processes
from thanos.study.store import read_store

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

TESTS = Path(__file__).parents[1]
STUDY = """
models = ["tiny"]
[evaluation]
text = "prose.txt"
sequence_length = 64
max_windows = 4
[[grid]]
method = "magnitude"
calibration = "prose.txt"
samples = 4
sequence_length = 32
"""


@pytest.mark.parametrize(
    ("how", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_an_ended_study_leaves_no_process_and_keeps_its_records(
    how: signal.Signals, code: int, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "tiny")
    shutil.copyfile(text_file, tmp_path / "prose.txt")
    shares = [each / 40 for each in range(1, 39)]  # enough that some are left when the signal comes
    (tmp_path / "study.toml").write_text(f"{STUDY}sparsity = {shares}\n")
    out = tmp_path / "out"
    command = [sys.executable, str(TESTS / "killed_study.py"), str(tmp_path / "study.toml"), str(out), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with (
        (tmp_path / "said").open("w") as said,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, env=environment) as study,
    ):
        assert study.stdout is not None
        ended = next((line for line in study.stdout if line.strip() == "4"), "")
        started = offspring(study.pid)
        names = [Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0] for pid in started]
        study.send_signal(how)
    try:
        assert ended, (tmp_path / "said").read_text()
        assert names.count(b"sleep") == 2, "each worker has a child"
        assert len(started) >= 4
        assert left_of(started) == set()
        assert study.returncode == code
        assert 4 <= len(read_store(out).done) < 39
    finally:
        for pid in started & processes().keys():
            os.kill(pid, signal.SIGKILL)


_WAITS = """
import os, time
from thanos.engine.stages.prune import PruneStage
from thanos.cli import main

def waits(self, context):
    os.write(1, b"waits\\n")  # at once: print writes the end of the line for itself, and two ranks share the pipe
    time.sleep(600)
    yield

PruneStage.__call__ = waits
main()
"""


def test_processes_whose_torchrun_was_killed_end(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text(_WAITS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "waits.py"), "prune", str(tiny_llama), str(tmp_path / "out"), "--calibration"]
    command += [str(text_file), "--samples", "4", "--sequence-length", "32", "--device", "cpu", "--quiet"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with (
        (tmp_path / "said").open("w") as said,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, env=environment) as launcher,
    ):
        assert launcher.stdout is not None
        said_by_ranks = (line for line in launcher.stdout if "waits" in line)  # others print bars of progress there
        waiting = [line for _, line in zip(range(2), said_by_ranks, strict=False)]
        started = offspring(launcher.pid)
        launcher.kill()
    try:
        assert len(waiting) == 2, (tmp_path / "said").read_text()
        assert len(started) >= 2
        assert left_of(started) == set()
        assert (tmp_path / "said").read_text().count("torchrun that started this process was killed") == 1
        assert not (tmp_path / "out").exists()
    finally:
        for pid in started & processes().keys():
            os.kill(pid, signal.SIGKILL)
