"""The tables that the commands print."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

import thanos
from helpers import save_tiny
from sparse_matrices import save_pruned
from thanos.cli import run
from thanos.cli.output import show_report, show_zero_shot
from thanos.cli.packed_output import show_packing
from thanos.cli.tables import print_table
from thanos.evaluation.tasks import ZeroShot
from thanos.export.record import LayerPacking, Packing


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


def cells(line: str) -> list[str]:
    return re.split(r"\s{2,}", line.strip())


def test_packed_layers_are_shown_by_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def layer(name: str, columns: int, share: int = 50, reason: str = "", n: int | None = 16) -> LayerPacking:
        form = "" if reason else "bitmap" if n is None else "fixed"
        return LayerPacking(
            name=name, rows=4, columns=columns, format=form, n=None if reason else n, nbytes=share, dense_bytes=100,
            reason=reason,
        )  # fmt: skip

    layers = [
        layer("model.layers.0.mlp.fc1", 8),
        layer("model.layers.0.mlp.fc2", 16),
        layer("model.layers.1.mlp.fc1", 8, 70),
        layer("model.layers.1.mlp.fc2", 16, n=None),
        layer("model.layers.2.mlp.fc1", 8, 100, "too dense: packed it would take 97 % of its bytes"),
        layer("model.layers.2.mlp.fc2", 16),
        layer("model.layers.3.mlp.fc1", 8, 100, "too dense: packed it would take 95 % of its bytes"),
        *[
            layer(f"model.layers.{block}.mlp.experts.{each}.up", 8, 100, "an expert: of a mixture")
            for block in range(2)
            for each in range(3)
        ],
        layer("lm_head", 8, 100, "shares its weight with the input embedding"),
    ]
    report = Packing(thanos_version="1", layers=layers, nbytes=5, dense_bytes=10, dense={})
    show_packing(report, tmp_path / "out", tmp_path / "p.json")
    head, _, *rows = [cells(line) for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert head == ["kind of layer", "layers", "shape", "format", "bytes", "stays dense because"]
    assert rows[:6] == [
        ["mlp.fc1", "2", "4 × 8", "fixed 16:32", "60.0 %", "-"],
        ["mlp.fc2", "2", "4 × 16", "fixed 16:32", "50.0 %", "-"],
        ["mlp.fc2", "1", "4 × 16", "bitmap", "50.0 %", "-"],
        [
            "mlp.fc1",
            "2",
            "4 × 8",
            "dense",
            "-",
            "too dense: packed it would take 97 % of its bytes (the first of them)",
        ],
        ["mlp.experts.#.up", "6", "4 × 8", "dense", "-", "an expert: of a mixture"],
        ["lm_head", "1", "4 × 8", "dense", "-", "shares its weight with the input embedding"],
    ]
    assert rows[6] == ["packed layers", "5 of 14"]
    assert [one["name"] for one in json.loads((tmp_path / "p.json").read_bytes())["layers"]] == [
        one.name for one in layers
    ]


def test_pack_prints_no_more_rows_for_more_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = []
    for blocks in (2, 4):
        model = save_pruned(tmp_path / f"model{blocks}", "llama", num_hidden_layers=blocks)
        assert run(["pack", str(model), str(tmp_path / f"out{blocks}"), "--least-weights", "1", "--quiet"]) == 0
        lines.append(len(capsys.readouterr().out.splitlines()))
    assert lines[0] == lines[1]
