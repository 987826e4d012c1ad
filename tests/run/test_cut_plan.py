"""What a plan says of a model that will be made smaller, and the words for what was asked and what came."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import thanos
from helpers import save_tiny, windows
from thanos.calibration.windows import Calibration
from thanos.cli import run
from thanos.run.cut_words import share_words
from whole_models import LENGTH, SAMPLES, recipe


def units(text: Path, **changes: Any) -> thanos.Recipe:
    return recipe(text, **{"pattern": "neurons", "sparsity": 0.25, "multiple_of": 8} | changes)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA with four query heads and two key-value heads."""
    return save_tiny(tmp_path_factory.mktemp("grouped") / "model", num_key_value_heads=2)


def without_choice(cut: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in cut.items() if key not in ("dropped_blocks", "split")}


@pytest.mark.parametrize(
    ("architecture", "changes", "config"),
    [
        ("llama", {"sparsity": 0.2}, {"intermediate_size": (64, 48)}),
        ("gpt-2", {"multiple_of": 1, "sparsity": 0.2}, {"n_inner": (128, 102)}),
        ("opt-125m", {}, {"ffn_dim": (64, 48)}),
        ("qwen3-moe", {"sparsity": 1 / 3}, {"moe_intermediate_size": (24, 16)}),
        ("llama", {"pattern": "blocks", "sparsity": 0.34, "multiple_of": None}, {"num_hidden_layers": (3, 2)}),
        ("mixtral", {"pattern": "blocks", "sparsity": 0.5, "multiple_of": None}, {"num_hidden_layers": (2, 1)}),
        (
            "qwen3",
            {"pattern": "heads", "sparsity": 0.5, "multiple_of": None},
            {"num_attention_heads": (4, 2), "num_key_value_heads": (2, 1)},
        ),
    ],
)
def test_a_plan_says_exactly_what_the_run_cuts(
    architecture: str, changes: dict[str, Any], config: Any, text_file: Path, tmp_path: Path
) -> None:
    model = save_tiny(tmp_path / "model", architecture)
    given = Calibration(windows(SAMPLES, LENGTH), str(text_file), "packed", 0, 1)
    made = units(text_file, **changes)
    planned = dict(thanos.plan(model, tmp_path / "out", made, calibration=given).cut)
    assert planned.pop("config") == {
        name: {"before": before, "after": after} for name, (before, after) in config.items()
    }
    assert planned == without_choice(thanos.prune(model, tmp_path / "out", made, calibration=given).cut)
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert planned["bytes_after"] == size
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert all(written[name] == after for name, (_, after) in config.items())


def test_a_plan_of_width_has_the_splits_of_which_the_run_takes_one(
    grouped: Path, text_file: Path, tmp_path: Path
) -> None:
    made = recipe(text_file, pattern="width", sparsity=0.3, multiple_of=1)
    planned = thanos.plan(grouped, tmp_path / "out", made).cut
    cut = thanos.prune(grouped, tmp_path / "out", made).cut
    assert len(planned["splits"]) == 2
    (taken,) = (one for one in planned["splits"] if one["removed"] == cut["split"]["splits"][0]["removed"])
    for name in ("parameters_after", "bytes_after", "share_of_block_parameters"):
        assert taken[name] == cut[name]


def test_what_was_asked_and_what_came_is_said_everywhere(
    tiny_llama: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "requested 20 % of the neurons, removed 25.00 %: a multiple of 16 remains"
    words += "; a smaller multiple_of may give a nearer number"
    made = ["--calibration", str(text_file), "--samples", str(SAMPLES), "--sequence-length", str(LENGTH)]
    made += ["--device", "cpu", "--pattern", "neurons", "--multiple-of", "16"]
    assert run(["prune", str(tiny_llama), str(tmp_path / "out"), *made, "--plan"]) == 0
    planned = capsys.readouterr().out
    assert words in " ".join(planned.split())
    assert "64 → 48" in planned
    assert run(["prune", str(tiny_llama), str(tmp_path / "out"), *made]) == 0
    shown = capsys.readouterr()
    assert words in " ".join(shown.out.split())
    assert words in (tmp_path / "out/README.md").read_text()
    assert any(
        f"48 of 64 neurons left in each block: {words}" == json.loads(line).get("message")
        for line in (tmp_path / "out/events.jsonl").read_text().splitlines()
    )
    cut = json.loads((tmp_path / "out/pruning.json").read_text())["cut"]
    assert (cut["asked"], cut["came"], cut["multiple_of"]) == (0.2, 0.25, 16)


@pytest.mark.parametrize(
    ("architecture", "changes", "words"),
    [
        ("llama", {"pattern": "heads", "sparsity": 0.5, "head_unit": "query"}, "gives other tokens without an error"),
        ("llama", {"pattern": "heads", "sparsity": 0.5}, "refuses the model"),
        ("qwen2", {"pattern": "heads", "sparsity": 0.5, "head_unit": "query"}, "gives other tokens without an error"),
        ("qwen3", {"pattern": "heads", "sparsity": 0.5, "head_unit": "query"}, ""),
        ("llama", {"multiple_of": 8}, ""),
        (
            "llama",
            {"pattern": "width", "sparsity": 0.17, "multiple_of": 64},
            "refuses the model",
        ),  # one split, of heads
    ],
)
def test_a_run_warns_of_a_program_that_cannot_run_the_model(
    architecture: str, changes: dict[str, Any], words: str, text_file: Path, tmp_path: Path
) -> None:
    model = save_tiny(tmp_path / "model", architecture, num_key_value_heads=2)
    given = Calibration(windows(SAMPLES, LENGTH), str(text_file), "packed", 0, 1)
    made = recipe(text_file, **{"pattern": "neurons", "sparsity": 0.25} | changes)
    report = thanos.prune(model, tmp_path / "out", made, calibration=given)
    found = [line for line in report.warnings if line.startswith("CTranslate2")]
    assert len(found) == bool(words)
    assert words in "".join(found)
    assert all(line in (tmp_path / "out/README.md").read_text() for line in found)


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        ({"asked": 0.25, "came": 0.25, "multiple_of": 64}, "requested 25 % of the neurons, removed 25.00 %"),
        ({"asked": 0.2, "came": 0.19921875, "multiple_of": 1}, "removed 19.92 %: no number of whole units is nearer"),
        ({"asked": 0.2, "came": 0.203125, "multiple_of": 2}, "removed 20.31 %: a multiple of 2 remains"),
    ],
)
def test_the_words_for_what_was_asked_and_what_came(cut: dict[str, Any], words: str) -> None:
    size = {"before": 64, "after": round(64 * (1 - cut["came"]))}
    assert share_words(cut | {"units": {"neurons": size}}).endswith(words)


def test_a_report_of_an_earlier_version_says_what_was_asked() -> None:
    assert (
        share_words({"asked": 0.2, "units": {"neurons": {"before": 64, "after": 48}}})
        == "requested 20 % of the neurons"
    )


@pytest.mark.parametrize(("effort", "layers"), [("fast", 0), ("high", 2)])
def test_a_plan_without_some_blocks_counts_the_layers_that_may_be_fitted(
    effort: str, layers: int, text_file: Path, tmp_path: Path
) -> None:
    model = save_tiny(tmp_path / "model", num_hidden_layers=6)
    made = recipe(text_file, pattern="blocks", sparsity=0.34, effort=effort)
    found = thanos.plan(model, tmp_path / "out", made)
    assert found.layers == layers
    assert {"allocate", "propagate", "finish"} <= found.phases.keys()
    report = thanos.prune(model, tmp_path / "out", made)
    assert len(report.layers) <= layers
    assert report.phases.keys() - {"finish"} <= found.phases.keys() | {"write"}
