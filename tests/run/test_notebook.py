"""The code of the notebook and of README runs from top to bottom, here with a tiny model in place of the one that they name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import ROOT, save_tiny
from thanos.model.loading import load_model
from thanos.model.source import resolve_model

NOTEBOOK = ROOT / "docs" / "notebook.ipynb"


def code_cells() -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_runs(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, *cells = code_cells()
    assert first["metadata"]["tags"] == ["parameters"]
    names: dict[str, Any] = {"__name__": "notebook"}
    exec("".join(first["source"]), names)
    small = {
        "MODEL": str(save_tiny(tmp_path / "model")),
        "CALIBRATION": str(text_file),
        "TEXT": str(text_file),
        "SAMPLES": 4,
        "LENGTH": 32,
        "WINDOWS": 3,
    }
    assert names.keys() >= small.keys(), "the test replaces all parameters"
    names |= small
    monkeypatch.chdir(tmp_path)
    for cell in cells:
        exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), names)
    printed = capsys.readouterr().out
    assert "weights are zero" in printed
    assert "KL divergence" in printed
    saved = load_model(resolve_model(tmp_path / "pruned")).state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in names["model"].state_dict().items())
    weight = saved["model.layers.0.mlp.down_proj.weight"]
    assert int((weight != 0).reshape(-1, 4).sum(1).max()) == 2


def test_the_code_of_readme_runs(tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    small = {
        '"HuggingFaceTB/SmolLM2-135M-Instruct"': repr(str(save_tiny(tmp_path / "model"))),
        '"pydoc"': repr(str(text_file)),
        "samples=16": "samples=4",
        "sequence_length=512": "sequence_length=32",
        "max_windows=16": "max_windows=3",
    }
    for shown, tiny in small.items():
        assert shown in code
        code = code.replace(shown, tiny)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), names)
    assert names["run"].totals["sparsity_targeted"] == 0.5
    weight = load_model(resolve_model(tmp_path / "out")).state_dict()["model.layers.0.mlp.down_proj.weight"]
    assert int((weight != 0).reshape(-1, 4).sum(1).max()) == 2
    assert int(names["pruned"].kept.sum()) == 64 * 128 // 2
    assert torch.equal(names["pruned"].kept, names["pruned"].weight != 0)


def test_the_notebook_is_stored_without_results() -> None:
    for cell in code_cells():
        assert not cell["outputs"]
        assert cell["execution_count"] is None
