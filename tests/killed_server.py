"""Preloaded by the server from which test_kill.py forks. It prunes once, so that all modules are imported."""

from __future__ import annotations

import tempfile
from pathlib import Path

import killed
import thanos
from helpers import prose, save_tiny

with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    (folder / "text.txt").write_text(prose(500), encoding="utf-8")
    thanos.prune(
        save_tiny(folder / "model"),
        folder / "out",
        thanos.Recipe(calibration=str(folder / "text.txt"), samples=2, sequence_length=16, targets=killed.TARGETS),
    )
