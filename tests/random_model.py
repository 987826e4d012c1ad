"""Checkpoints of random weights, as benchmarks/make_checkpoint.py writes them."""

from __future__ import annotations

import importlib.util
from typing import Any

from helpers import ROOT

_spec: Any = importlib.util.spec_from_file_location("random_checkpoints", ROOT / "benchmarks" / "make_checkpoint.py")
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)

write_checkpoint = _module.write_checkpoint
