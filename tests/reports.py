"""Outputs of finished runs, for tests in several files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from thanos.engine.records import LayerRecord

TIMINGS = ("phases", "seconds", "host_peak_bytes", "device_peak_bytes")


def layer(name: str, shape: tuple[int, int] = (4, 6), **changes: Any) -> LayerRecord:
    values: dict[str, Any] = {
        "name": name,
        "block": 0,
        "shape": shape,
        "dtype": "float32",
        "method": "thanos",
        "pattern": "unstructured",
        "sparsity": 0.5,
        "zeros": shape[0] * shape[1] // 2,
        "outlier_rows": 0,
        "error_before_compensation": 0.2,
        "error_after_compensation": 0.1,
        "damping": 0.01,
        "damping_reason": "",
        "tokens": 2048,
        "seconds": 0.25,
    }
    return LayerRecord(**{**values, **changes})


def contents(folder: Path) -> dict[str, Any]:
    """File name → bytes. The report has no times and no memory; of the log only whether it is not empty."""
    found: dict[str, Any] = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")}
    report = {key: value for key, value in json.loads(found["pruning.json"]).items() if key not in TIMINGS}
    report["layers"] = [{k: v for k, v in layer.items() if k != "seconds"} for layer in report["layers"]]
    for record in report.get("tuning", []):
        del record["seconds"]
    return found | {"pruning.json": report, "events.jsonl": bool(found["events.jsonl"])}
