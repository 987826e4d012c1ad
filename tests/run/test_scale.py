"""Peak memory does not grow with the number of blocks."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from random_model import write_checkpoint
from thanos.bench.synthetic import Shape

# A process of its own, so that nothing but the run counts; its children's figure is what the system saw.
_RUN = """
import resource, subprocess, sys
subprocess.run([sys.executable, "-m", "thanos", "prune", *sys.argv[1:]], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.slow
def test_sixteen_and_sixty_four_blocks_take_the_memory_of_four(tmp_path: Path) -> None:
    draw, text = random.Random(0), tmp_path / "numbers.txt"
    text.write_text(" ".join(str(draw.randrange(2, 512)) for _ in range(2000)), encoding="utf-8")
    peaks, sizes = {}, {}
    for blocks in (4, 16, 64):
        shape = Shape(hidden=512, intermediate=1408, heads=8, kv_heads=2, blocks=blocks, vocabulary=512)
        model = tmp_path / f"model-{blocks}"
        sizes[blocks] = write_checkpoint(model, shape)
        arguments = [str(model), str(tmp_path / f"out-{blocks}"), "--calibration", str(text), "--quiet"]
        arguments += ["--samples", "2", "--sequence-length", "32", "--targets", "k_proj"]
        run = subprocess.run([sys.executable, "-c", _RUN, *arguments], capture_output=True, text=True, check=True)
        peaks[blocks] = int(run.stdout) * 1024
    assert sizes[64] - sizes[4] > 0.3 * peaks[4], "so much more, if it stayed in memory, would be seen"
    assert max(peaks[16], peaks[64]) <= 1.1 * peaks[4], peaks
