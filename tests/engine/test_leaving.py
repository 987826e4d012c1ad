"""A group that was left has no thread any more, or the process does not go through Python's end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

_LEAVES = """
import atexit, os, sys
import torch, torch.distributed as dist
from thanos.cli import torchrun
from thanos.engine import leaving

def threads():
    names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    return sum("gloo" in name for name in names) > 0

atexit.register(lambda: print("Python ends"))
if sys.argv[1] == "mended":
    leaving.import_group_holders()
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=0, world_size=1)
leaving.remember_group()
import torch.distributed.nn.functional  # as models do, when there is a group already
dist.all_reduce(torch.ones(3))
print("while joined", threads(), leaving.outlived())
dist.destroy_process_group()
print("afterwards", threads(), leaving.outlived())
os.environ.update(RANK="0", WORLD_SIZE="2")  # as one of several
torchrun.leave(0)
"""


@pytest.mark.parametrize(
    ("how", "afterwards"),
    [("mended", ["afterwards False False", "Python ends"]), ("kept", ["afterwards True True"])],
)
def test_python_ends_in_its_usual_way_only_without_the_threads_of_a_group(
    how: str, afterwards: list[str], tmp_path: Path
) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _LEAVES, how, str(tmp_path / "meet")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["while joined True True", *afterwards]
