"""Perplexity of a pruned model for every method and pattern: the figures of docs/results/.

    python benchmarks/accuracy.py MODEL --calibration c4.jsonl --text test.jsonl --out results.jsonl [--cells NAME ...]

Each cell is one ``thanos.prune`` and two ``thanos.evaluate``: rows joined with a blank line (the field's convention) and
rows simply concatenated (as the reference figures were taken). One JSON object a line: recipe, totals, perplexities,
seconds by phase, versions, commit, device.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import thanos
from thanos.text import evaluation_rows

METHODS = ("magnitude", "wanda", "sparsegpt", "thanos")


def cells() -> dict[str, dict[str, Any]]:
    """Return the recipes by name."""
    found: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        for sparsity in (0.5, 0.7):
            found[f"{method}-{sparsity:.0%}"] = {"method": method, "sparsity": sparsity}
        for pattern in ("2:4", "4:8"):
            found[f"{method}-{pattern}"] = {"method": method, "pattern": pattern}
        for sparsity in (0.2, 0.3):
            found[f"{method}-columns-{sparsity:.0%}"] = {"method": method, "pattern": "columns", "sparsity": sparsity}
    for share in (0.1, 0.2):
        found[f"thanos-columns-20%-alpha-{share}"] = {"pattern": "columns", "sparsity": 0.2, "outlier_rows": share}
    found["thanos-columns-30%-alpha-0.1"] = {"pattern": "columns", "sparsity": 0.3, "outlier_rows": 0.1}
    found["thanos-2:4-alpha-0.1"] = {"pattern": "2:4", "outlier_rows": 0.1}
    found["thanos-2:4-B-128"] = {"pattern": "2:4", "block_size": 128}
    found["thanos-50%-B-512"] = {"sparsity": 0.5, "block_size": 512}
    return found


def main() -> None:
    """Run the cells that were asked for, appending to the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--max-windows", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cells", nargs="*", help="names; all by default")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further cell after so long")
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        joined = Path(folder) / "concatenated.txt"
        joined.write_text("".join(evaluation_rows(arguments.text)), encoding="utf-8")
        wanted = arguments.cells or ["dense", *cells()]
        for name in wanted:
            if time.monotonic() - began > arguments.seconds:
                break
            record = run_cell(name, arguments, Path(folder), joined)
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def run_cell(name: str, arguments: argparse.Namespace, folder: Path, joined: Path) -> dict[str, Any]:
    """Prune and evaluate one cell; ``dense`` is only evaluated."""
    record: dict[str, Any] = {"cell": name, "commit": commit(), "date": datetime.date.today().isoformat()}
    model = arguments.model
    if name != "dense":
        recipe = thanos.Recipe(
            calibration=arguments.calibration,
            samples=arguments.samples,
            sequence_length=arguments.sequence_length,
            seed=arguments.seed,
            dtype=arguments.dtype,
            **cells()[name],
        )
        report = thanos.prune(model, folder / "pruned", recipe, overwrite=True)
        model = folder / "pruned"
        values = report.to_dict()
        values["recipe"]["calibration"] = Path(arguments.calibration).name
        values["calibration"]["source"] = Path(arguments.calibration).name
        record |= {key: values[key] for key in ("recipe", "calibration", "totals", "phases", "seconds", "versions")}
        record["device_peak_bytes"] = report.device_peak_bytes
        record["block_seconds"] = sum(layer.seconds for layer in report.layers)
    settings = {"sequence_length": arguments.sequence_length, "max_windows": arguments.max_windows}
    settings["dtype"] = arguments.dtype
    for key, text, dense in (("blank_line", arguments.text, arguments.model), ("concatenated", str(joined), None)):
        result = thanos.evaluate(model, text=text, dense=dense, **settings).to_dict()
        kept = ("windows", "tokens", "perplexity", "dense_perplexity", "kl_divergence", "top1_agreement", "text_sha256")
        record[key] = {field: result[field] for field in kept}
        record["device"] = result["device"]
    return record


def commit() -> str:
    """Return the commit that runs, or what COMMIT says where there is no repository."""
    import os

    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
