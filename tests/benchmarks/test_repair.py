"""Cells of benchmarks/repair.py: generated sequences that recoveries share, and pruned models that are used again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers import benchmark_script

repair = benchmark_script("repair")


def rows_of(
    cells: list[dict[str, Any]], folder: Path, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, Any]]:
    """Run the cells as one process of the script does; return the new lines without origin."""
    (folder / "cells.json").write_text(json.dumps(cells))
    claims, results = folder / "claims", folder / "rows.jsonl"
    claims.mkdir()
    monkeypatch.setenv("CLAIMS", str(claims))
    paths = f"--model {model} --text {text} --calibration {text} --keep {folder / 'keep'} --share {folder / 'share'}"
    options = "--samples 5 --sequence-length 32 --commit abc --no-dense --reuse --rank 0"
    words = ["repair.py", str(folder / "cells.json"), str(results), *paths.split(), *options.split()]
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setattr(repair, "measured", lambda *arguments, **how: {})  # with windows of 2048 tokens
    before = len(results.read_text().splitlines()) if results.exists() else 0
    repair.main()
    claims.joinpath("0").unlink()
    claims.rmdir()
    return [json.loads(line) for line in results.read_text().splitlines()[before:]]


def test_recoveries_share_generated_sequences_and_pruned_models(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings = [{"generate": 4, "epochs": 1}, {"generate": 4, "epochs": 1, "rate": 1e-3}, {"generate": 8, "epochs": 1}]
    cell = {"name": "a", "recipe": {"method": "magnitude", "sparsity": 0.5, "device": "cpu"}}
    cell["recover"] = [training | {"device": "cpu"} for training in trainings]
    first = rows_of([cell], tmp_path, tiny_llama, text_file, monkeypatch)
    assert [(row["name"], row.get("shared"), row.get("failed")) for row in first] == [
        ("a", None, None),
        ("a-recovered-0", None, None),
        ("a-recovered-1", True, None),
        ("a-recovered-2", None, None),
    ]
    again = rows_of([cell], tmp_path, tiny_llama, text_file, monkeypatch)
    assert [(row["name"], row.get("shared")) for row in again] == [
        (f"a-recovered-{number}", True) for number in range(3)
    ]
    assert [row["history"] for row in again] == [row["history"] for row in first[1:]]
    cell["recipe"] = {"method": "magnitude", "sparsity": 0.4, "device": "cpu"}
    (refused,) = rows_of([cell], tmp_path, tiny_llama, text_file, monkeypatch)
    assert "sparsity 0.5 → 0.4" in refused["failed"]


def test_models_are_used_again_only_from_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sys.argv", ["repair.py", "c", "r", "--model", "m", "--text", "t", "--calibration", "t", "--reuse"]
    )
    with pytest.raises(SystemExit):
        repair.main()
