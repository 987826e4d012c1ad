"""Measure the perplexity of a study's pruned models on rows joined without a separator, as for the reference perplexities.

    python benchmarks/concatenated.py STUDY --dense MODEL --text test.jsonl --out concatenated.jsonl [--device cuda:0]

STUDY is the folder of a study that ran with ``keep_models = true``; cells whose model was not kept are left out. The output
has one JSON object per line: the cell, its perplexity on the concatenated rows (and on the rows joined with a blank line,
from the store), commit, device, date.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
from pathlib import Path
from typing import Any

import thanos
from thanos.calibration.text import evaluation_rows


def main() -> None:
    """Evaluate the kept models of the study that ``--share`` selects; append each result to the output at once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--dense", required=True, help="the dense model, which the study does not keep")
    parser.add_argument("--text", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--share",
        default="0/1",
        help="I/N: evaluate only models number I, I + N, ..., so that N processes can divide the work",
    )
    arguments = parser.parse_args()
    first, step = map(int, arguments.share.split("/"))
    lines = (arguments.study / "store.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if record["status"] == "done" and record["evaluation"]]
    with tempfile.TemporaryDirectory() as folder:
        joined = Path(folder) / "concatenated.txt"
        joined.write_text("".join(evaluation_rows(arguments.text)), encoding="utf-8")
        for record in records[first::step]:
            if record["cell"]["seed"] in (0, None) and Path(model_of(record, arguments)).exists():
                result = evaluate(record, joined, arguments)
                with arguments.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")


def evaluate(record: dict[str, Any], text: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Score one model on the concatenated rows."""
    result = thanos.evaluate(
        model_of(record, arguments), text=str(text), device=arguments.device, dtype=arguments.dtype
    )
    return {
        "key": record["key"],
        "cell": record["cell"],
        "sparsity": record["effective_sparsity"]["targeted"],
        "mean_error": mean_error(record["layers"] or []),
        "blank_line": record["evaluation"]["perplexity"],
        "concatenated": result.perplexity,
        "windows": result.windows,
        "tokens": result.tokens,
        "text_sha256": result.text_sha256,
        "commit": record["commit"],
        "device": result.device,
        "date": datetime.date.today().isoformat(),
    }


def model_of(record: dict[str, Any], arguments: argparse.Namespace) -> str | Path:
    """Return the path of a cell's model; it does not exist if the model was not kept."""
    dense = record["cell"]["method"] == "dense"
    return arguments.dense if dense else arguments.study / "models" / record["key"][:16]


def mean_error(layers: list[dict[str, Any]]) -> float | None:
    """Return the unweighted mean of the layers' relative errors; None for the dense model."""
    errors = [layer["error_after_compensation"] for layer in layers]
    return sum(errors) / len(errors) if errors else None


if __name__ == "__main__":
    main()
