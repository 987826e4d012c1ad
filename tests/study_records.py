"""A store of plausible random numbers for the report's tests, in the form of a real study."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from thanos.recipe import LayerRecipe
from thanos.registry import parse_pattern
from thanos.study.store import CellRecord, Contents, StoreWriter, cell_key

METHODS = ("thanos", "sparsegpt", "wanda", "magnitude")
TASKS = ("winogrande", "openbookqa", "piqa", "arc_easy", "arc_challenge")
KINDS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
MODEL = "SmolLM2-135M"

_DENSE = 21.97
_HARM = {"thanos": 0.71, "sparsegpt": 0.77, "wanda": 0.86, "magnitude": 3.3, "admm": 0.65}
_PATTERN_HARM = {"unstructured": 1.0, "4:8": 1.45, "2:4": 1.95, "columns": 6.0}


def cell(method: str = "thanos", pattern: str | None = "unstructured", **changes: Any) -> dict[str, Any]:
    """One cell in the form of the store: no sparsity for n:m; block size and damping only if the method has them."""
    if method == "dense":
        names = (
            "pattern",
            "sparsity",
            "outlier_rows",
            "keep_budget",
            "block_size",
            "damping",
            "calibration",
            "samples",
        )
        return {"model": MODEL, "method": "dense"} | dict.fromkeys((*names, "sequence_length", "seed")) | changes
    assert pattern is not None
    damps = method in ("thanos", "sparsegpt")
    has_blocks = damps and pattern != "columns"
    found = {
        "model": MODEL,
        "method": method,
        "pattern": pattern,
        "sparsity": None if ":" in pattern else 0.5,
        "outlier_rows": 0.0,
        "keep_budget": False,
        "block_size": LayerRecipe(method=method, pattern=pattern).resolved_block_size if has_blocks else None,
        "damping": 0.01 if damps else None,
        "calibration": "c4-sample.jsonl",
        "samples": 128,
        "sequence_length": 2048,
        "seed": 0,
    }
    return found | changes


def record(
    given: dict[str, Any],
    *,
    perplexity: float | None = None,
    sparsity: float | None = None,
    blocks: int = 3,
    **changes: Any,
) -> CellRecord:
    """The record of a finished cell, with random numbers seeded by its key. Arguments replace these numbers."""
    asked = {"dtype": "float32", "evaluation": {"text": "wikitext2", "sequence_length": 2048, "max_windows": None}}
    key = cell_key(given, asked)
    draw = random.Random(key)
    reached = _reached(given) if sparsity is None else sparsity
    scored = _perplexity(given, draw) if perplexity is None else perplexity
    values: dict[str, Any] = {
        "key": key,
        "status": "done",
        "reason": None,
        "date": "2026-11-20T10:00:00+00:00",
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "thanos_version": "0.1.0",
        "versions": {"python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0"},
        "machine": {"device": "NVIDIA H100", "platform": "Linux", "cores": 16, "memory_bytes": 2**37},
        "cell": given,
        "asked": asked,
        "sources": {"model": None, "calibration": None, "text": None},
        "effective_sparsity": {"targeted": reached, "all": 0.79 * reached},
        "evaluation": {
            "text": "wikitext-2-raw-v1",
            "text_sha256": "ab" * 32,
            "sequence_length": 2048,
            "windows": 147,
            "tokens": 147 * 2047,
            "perplexity": scored,
            "mean_loss": math.log(scored),
            "kl_divergence": max(0.0, math.log(scored / _DENSE)) * 1.07,
            "top1_agreement": min(1.0, 1.0 / (1.0 + 0.5 * math.log(scored / _DENSE + 1e-9)))
            if scored > _DENSE
            else 1.0,
        },
        "zero_shot": _zero_shot(scored, draw),
        "layers": [] if given["method"] == "dense" else _layers(given, reached, draw, blocks),
        "phases": {
            "solve": {"seconds": 0.6 * _seconds(given), "host_peak_bytes": 2**31, "device_peak_bytes": 2**32},
            "finish": {"seconds": 0.1, "host_peak_bytes": 2**31, "device_peak_bytes": 2**31},
            "reference": {"seconds": 0.2, "host_peak_bytes": 2**30, "device_peak_bytes": 2**30},
        },
        "seconds": None if given["method"] == "dense" else _seconds(given) * draw.uniform(0.98, 1.02),
        "host_peak_bytes": 3 * 2**30,
        "device_peak_bytes": int(2**32 * (1.3 if given["method"] in ("thanos", "sparsegpt") else 1.0)),
    }
    return CellRecord(**(values | changes))


def failed(given: dict[str, Any], reason: str) -> CellRecord:
    """The record of a failed cell."""
    empty = {
        "effective_sparsity": None,
        "evaluation": None,
        "zero_shot": None,
        "layers": [],
        "phases": {},
        "seconds": None,
    }
    return record(given, status="failed", reason=reason, host_peak_bytes=None, device_peak_bytes=None, **empty)


def cost_record(given: dict[str, Any], **changes: Any) -> CellRecord:
    """The record of a finished cell of a model with ``cost_only``."""
    asked = {"dtype": "float32", "evaluation": None, "zero_shot": None}
    none = {"asked": asked, "key": cell_key(given, asked), "evaluation": None, "zero_shot": None}
    return record(given, **{**none, **changes})


def cost_study(model: str, blocks: int = 2) -> list[CellRecord]:
    """A record for each cell of a study of one model with ``cost_only``."""
    cells = [cell(method, pattern) for pattern in ("unstructured", "2:4", "4:8", "columns") for method in METHODS]
    for size in (2**power for power in range(3, 12)):
        cells += [cell("thanos", pattern, block_size=size) for pattern in ("unstructured", "4:8", "2:4")]
    records = {(found := cost_record(one | {"model": model}, blocks=blocks)).key: found for one in cells}
    return list(records.values())


def full_study(model: str = MODEL, blocks: int = 6) -> list[CellRecord]:
    """A record for each cell of the full study of one model."""
    seeds = (0, 1, 2)
    cells = [cell("dense", None)]
    for method in METHODS:
        for seed in seeds:
            cells += [cell(method, seed=seed), cell(method, "2:4", seed=seed), cell(method, "4:8", seed=seed)]
            cells.append(cell(method, "columns", sparsity=0.3, seed=seed))
        for step in range(1, 9):
            cells.append(cell(method, sparsity=step / 10))
            cells.append(cell(method, "columns", sparsity=step / 10))
        cells.append(cell(method, sparsity=0.45))
        for pattern in ("2:4", "4:8"):
            cells.append(cell(method, pattern, outlier_rows=0.1))
            cells.append(cell(method, pattern, outlier_rows=0.1, keep_budget=True))
        if method != "thanos":
            cells.append(cell(method, "columns", sparsity=0.3, outlier_rows=0.1, keep_budget=True))
    for alpha in (0.02, 0.05, 0.1, 0.15, 0.2, 0.3):
        cells.append(cell("thanos", "2:4", outlier_rows=alpha, keep_budget=True))
        cells.append(cell("thanos", "columns", sparsity=0.3, outlier_rows=alpha, keep_budget=True))
    for step in range(1, 8):
        cells.append(cell("thanos", "columns", sparsity=step / 10, outlier_rows=0.1, keep_budget=True))
    for size in (2**power for power in range(3, 12)):
        cells += [cell("thanos", pattern, block_size=size) for pattern in ("unstructured", "4:8", "2:4")]
    cells.append(cell("thanos", damping=0.1))
    cells.append(cell("thanos", scope="row"))
    records = {(found := record(one | {"model": model}, blocks=blocks)).key: found for one in cells}
    return list(records.values())


def contents(records: Iterable[CellRecord]) -> Contents:
    """The contents of a store with these records."""
    return Contents(list(records), [])


def write_store(folder: Path, records: Iterable[CellRecord]) -> Path:
    """Write a store; return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = StoreWriter(folder)
    for one in records:
        writer.append(one)
    return folder


def _asked(given: dict[str, Any]) -> float:
    if given["pattern"] is None:
        return 0.0
    implied = parse_pattern(given["pattern"]).sparsity
    return given["sparsity"] if implied is None else implied


def _reached(given: dict[str, Any]) -> float:
    lowered = ":" in (given["pattern"] or "") and not given["keep_budget"]
    return _asked(given) * (1 - (given["outlier_rows"] or 0.0) if lowered else 1.0) + 0.0001 * (given["model"] != MODEL)


def _perplexity(given: dict[str, Any], draw: random.Random) -> float:
    if given["method"] == "dense":
        return _DENSE
    share = _reached(given)
    alpha = given["outlier_rows"]
    harm = _HARM[given["method"]] * _PATTERN_HARM[given["pattern"]] * (2 * share) ** 2.6
    harm *= 1 - 2.2 * alpha + 7 * alpha**2
    if given["method"] == "thanos":
        harm *= 1 + 0.012 * abs(math.log2((given["block_size"] or 128) / 256))
    return _DENSE * math.exp(harm * draw.uniform(0.985, 1.015))


def _zero_shot(perplexity: float, draw: random.Random) -> dict[str, Any]:
    level = 0.34 + 0.16 * (_DENSE / perplexity) ** 0.5
    tasks = {
        name: {
            "acc": level * draw.uniform(0.9, 1.1),
            "acc_stderr": 0.012,
            "acc_norm": level,
            "acc_norm_stderr": 0.012,
            "samples": 1000,
        }
        for name in TASKS
    }
    average = sum(task["acc"] for task in tasks.values()) / len(tasks)
    return {"tasks": tasks, "average": {"acc": average, "acc_stderr": 0.0055}}


def _layers(given: dict[str, Any], sparsity: float, draw: random.Random, blocks: int) -> list[dict[str, Any]]:
    found = []
    for block in range(blocks):
        for kind in KINDS:
            before = draw.uniform(0.01, 0.2) * (1 + block / blocks)
            found.append(
                {
                    "name": f"model.layers.{block}.{kind}",
                    "block": block,
                    "shape": [576, 576],
                    "sparsity": sparsity,
                    "zeros": round(sparsity * 576 * 576),
                    "method": given["method"],
                    "pattern": given["pattern"],
                    "error_before_compensation": before,
                    "error_after_compensation": before * draw.uniform(0.3, 0.7),
                    "tokens": 262144,
                    "seconds": 0.01,
                }
            )
    return found


def _seconds(given: dict[str, Any]) -> float:
    base = {"thanos": 31.0, "sparsegpt": 24.0, "wanda": 14.0, "magnitude": 3.0, "admm": 90.0, "dense": 0.0}
    blocks = 120.0 / (given["block_size"] or 128) if given["method"] == "thanos" else 0.0
    return base[given["method"]] + blocks * 4
