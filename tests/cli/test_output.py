"""The tables that the commands print."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

import thanos
from helpers import save_tiny
from thanos.cli.output import show_report, show_zero_shot
from thanos.cli.tables import print_table
from thanos.evaluation.tasks import ZeroShot


def test_the_summary_of_a_run_tells_after_which_step_its_errors_were_measured(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"calibration": str(text_file), "samples": 6, "sequence_length": 32, "device": "cpu"}
    plain = thanos.prune(save_tiny(tmp_path / "dense"), tmp_path / "out", thanos.Recipe(**settings, tune=1))
    fast = dataclasses.replace(
        plain, layers=[dataclasses.replace(layer, changed_by=None) for layer in plain.layers], block_errors=[]
    )
    show_report(fast, tmp_path / "out")
    printed = capsys.readouterr().out
    assert "mean layer error, as written" in printed
    assert "after each stage" not in printed

    layers = [dataclasses.replace(layer, changed_by=["tune"]) for layer in plain.layers]
    show_report(dataclasses.replace(plain, layers=layers), tmp_path / "out")
    printed = capsys.readouterr().out
    assert "as written" not in printed, "the errors of the layers are older than the weights"
    assert "mean layer error, before tuning" in printed
    last = plain.block_errors[-1]
    stages = ", ".join(f"{error:.5f} ({stage})" for stage, error in last.errors.items())
    assert f"error of block {last.block + 1}, after each stage" in printed
    assert stages in printed


@pytest.mark.parametrize(("bos", "said"), [("window", "with BOS"), ("text", "as the tokenizer begins a text")])
def test_accuracies_are_shown_with_the_beginning_of_the_requests(
    bos: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    average = {"acc": 0.5, "acc_stderr": 0.1, "acc_norm": None, "acc_norm_stderr": None}
    result = ZeroShot(
        model="folder/m",
        tasks={"t": average | {"samples": 4}},
        average=average,
        limit=None,
        cached=[],
        seconds=1.0,
        dtype="float32",
        device="cpu",
        versions={"lm_eval": "0.4"},
        bos=bos,
    )
    show_zero_shot(result, None)
    assert f"m, zero-shot (lm_eval 0.4); requests begin {said}" in " ".join(capsys.readouterr().out.split())


def test_a_wide_table_breaks_its_headings_and_not_the_names_of_models(capsys: pytest.CaptureFixture[str]) -> None:
    heads = (
        "on disk",
        "in memory",
        "first token",
        "KL",
        "top-1",
        "zero-shot",
        "standard error",
        "peak memory",
        "pruning",
    )
    name = "16of32-recovered-packed"
    print_table(("Model", *(f"{head} (unit)" for head in heads)), [(name, *["269"] * len(heads))])
    lines = capsys.readouterr().out.splitlines()
    assert any(re.fullmatch(rf"\s*{name}(\s+269){{9}}\s*", line) for line in lines)
    assert sum("(unit)" in line for line in lines) == 1  # all units are in the second line
    print_table(("Model", "on disk (MB)"), [(name, "269")])
    assert "on disk (MB)" in capsys.readouterr().out
