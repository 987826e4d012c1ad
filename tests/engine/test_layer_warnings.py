"""Warnings of layers, one line for each kind."""

from __future__ import annotations

from pathlib import Path

import pytest

import thanos
from helpers import save_tiny
from reports import layer
from thanos.cli import run
from thanos.engine.layer_warnings import expert_notes, warning_lines
from thanos.run.model_card import model_card

_FEW = "only {} calibration tokens for {} input columns: the Hessian is singular without damping"


def test_layers_with_few_tokens_are_one_line_with_the_worst_of_them() -> None:
    tokens = {"a": (40, 64), "b": (20, 64), "c": (20, 32), "d": (63, 64)}
    layers = [layer(name, (8, b), tokens=t, warnings=[_FEW.format(t, b)]) for name, (t, b) in tokens.items()]
    [line] = warning_lines([*layers, layer("e")])
    assert line == (
        "4 layers have fewer calibration tokens than input columns, at worst 0.31 per column (20 for 64 in b), so that a "
        "Hessian is singular without damping; raise --samples"
    )
    [line] = warning_lines(layers[:1], quote="`")
    assert line.startswith(
        "1 layer has fewer calibration tokens than input columns, at worst 0.62 per column (40 for 64 in `a`)"
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("3 of 64 input columns were always zero", "17 of 1024 input columns were always zero"),
        (
            "damping raised to 0.1: not positive definite with damping 0.01",
            "damping raised to 10: not positive definite with damping 0.01, 0.1, 1",
        ),
        (
            "the damped Hessian is badly conditioned: condition number about 1.3e+06",
            "the damped Hessian is badly conditioned: condition number about 2.0e+11",
        ),
        (
            "all 128 calibration tokens were zero here: pruned by magnitude, not thanos",
            "all 12 calibration tokens were zero here: pruned by magnitude, not thanos",
        ),
    ],
)
def test_what_differs_in_numbers_alone_is_one_kind(first: str, second: str) -> None:
    layers = [layer("a", warnings=["other", first]), layer("b", warnings=[second]), layer("c", warnings=[second])]
    assert warning_lines(layers) == ["a: other", f"3 layers, the first of them a: {first}"]
    assert warning_lines(layers[:1], quote="`") == ["`a`: other", f"`a`: {first}"]
    assert warning_lines([]) == []


@pytest.mark.parametrize(
    ("method", "solves"), [("thanos", True), ("sparsegpt", True), ("wanda", False), ("magnitude", False)]
)
def test_few_tokens_matter_only_to_methods_that_solve(
    method: str, solves: bool, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe = thanos.Recipe(method=method, calibration=str(text_file), samples=2, sequence_length=8, device="cpu")
    report = thanos.prune(tiny_llama, tmp_path / "out", recipe)
    assert {layer.tokens < layer.shape[1] for layer in report.layers} == {True}
    assert any("singular" in line for line in warning_lines(report.layers)) is solves


@pytest.mark.parametrize("damping", [0.01, None])
def test_experts_with_few_tokens_matter_only_to_methods_that_solve(damping: float | None) -> None:
    records = [layer("a", (8, 64), tokens=5, damping=damping), layer("b", (8, 64), tokens=0, damping=None)]
    notes = expert_notes({"a": "x", "b": "y"}, records)
    assert [("singular" in note, "no calibration token" in note) for note in notes] == [(True, False)] * bool(
        damping
    ) + [(False, True)]


def test_display_and_card_say_once_what_every_record_says(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = save_tiny(tmp_path / "dense"), tmp_path / "out"
    arguments = ["prune", str(folder), str(out), "--calibration", str(text_file), "--samples", "1"]
    assert run([*arguments, "--sequence-length", "20", "--device", "cpu", "--quiet"]) == 0
    report = thanos.PruningReport.read(out / "pruning.json")
    assert len(report.layers) == 21
    for record in report.layers:
        assert record.warnings[0] == _FEW.format(20, record.shape[1])
    expected = "21 layers have fewer calibration tokens than input columns, at worst 0.31 per column (20 for 64 in "
    said = [line for line in capsys.readouterr().err.splitlines() if "singular" in line]
    assert len(said) == 1
    assert said[0].startswith(f"warning: {expected}model.layers.0.mlp.down_proj)")
    written = [line for line in model_card(report).splitlines() if "singular" in line]
    assert len(written) == 1
    assert written[0].startswith(f"- {expected}`model.layers.0.mlp.down_proj`)")
