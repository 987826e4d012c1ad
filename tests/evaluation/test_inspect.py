"""Inspection against weights whose zeros were put there by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import thanos
from helpers import save_tiny
from thanos.cli import run
from thanos.errors import ModelError, RecipeError
from thanos.evaluation.inspect import inspect_checkpoint

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model")


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def two_four(weight: torch.Tensor) -> None:
    """Two zeros in each group of four, at places that change from row to row."""
    groups = weight.view(len(weight), -1, 4)
    for row in range(len(weight)):
        groups[row, :, [row % 4, (row + 1 + row // 4 % 3) % 4]] = 0


def every_linear(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [tensor for name, tensor in tensors.items() if "proj" in name]


def test_a_dense_model_has_no_targeted_layer(model: Path) -> None:
    found = inspect_checkpoint(model)
    assert found.layers == []
    assert found.totals["zeros_all"] == 32, "the embedding of the padding token"
    assert found.totals["parameters"] == sum(t.numel() for t in load_file(model / "model.safetensors").values())
    reasons = {record.name: record.reason for record in found.dense}
    assert reasons["lm_head.weight"] == "outside the decoder blocks"
    assert reasons["model.norm.weight"] == "not a linear layer's weight"
    assert "no zeros" in reasons[f"{UP}.weight"]


def test_patterns_are_recognised(model: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        two_four(tensors[f"{UP}.weight"])
        groups = tensors["model.layers.0.mlp.up_proj.weight"].view(64, 4, 8)
        groups[::2, :, [0, 1, 2, 7]] = 0  # 4:8, and no 2:4
        groups[1::2, :, [3, 4, 5, 6]] = 0
        tensors["model.layers.0.mlp.down_proj.weight"][:, ::5] = 0
        with_outliers = tensors["model.layers.2.mlp.up_proj.weight"]
        kept = with_outliers[:6].clone()
        two_four(with_outliers)
        with_outliers[:6] = kept

    edit(model, change)
    layers = {layer.name: layer for layer in inspect_checkpoint(model, require="1:4").layers}
    assert layers[UP].patterns == ["2:4", "4:8"]
    assert layers["model.layers.0.mlp.up_proj"].patterns == ["4:8"]
    assert layers["model.layers.0.mlp.down_proj"].patterns == ["columns"]
    assert layers["model.layers.0.mlp.down_proj"].zero_columns == 13
    outliers = layers["model.layers.2.mlp.up_proj"]
    assert (outliers.outlier_rows, outliers.patterns) == (6, ["2:4", "4:8"])
    assert outliers.zeros == 58 * 16
    assert outliers.sparsity == 58 / 64 / 2


def test_totals_count_every_zero_of_the_files(model: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][:7] = 0
        two_four(tensors[f"{UP}.weight"])

    edit(model, change)
    totals = inspect_checkpoint(model).totals
    tensors = load_file(model / "model.safetensors").values()
    assert totals["zeros_all"] == sum(int((tensor == 0).sum()) for tensor in tensors)
    assert totals["zeros_targeted"] == 64 * 32 / 2
    assert totals["sparsity_targeted"] == 0.5


def test_require_names_every_tensor_that_breaks_the_pattern(model: Path) -> None:
    edit(model, lambda tensors: [two_four(tensor) for tensor in every_linear(tensors)])
    assert inspect_checkpoint(model, require="2:4").violations == []
    edit(model, lambda tensors: tensors[f"{UP}.weight"][3, 8:12].fill_(1.0))
    violations = inspect_checkpoint(model, require="2:4").violations
    assert [(v.name, v.reason) for v in violations] == [(UP, "1 of 512 groups hold more than 2 non-zeros")]


def test_a_layer_that_was_forgotten_breaks_a_required_pattern(model: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for tensor in every_linear(tensors):
            two_four(tensor)
        tensors[f"{UP}.weight"].fill_(1.0)

    edit(model, change)
    found = inspect_checkpoint(model, require="2:4")
    assert [violation.name for violation in found.violations] == [UP]
    assert len(found.layers) == 21


def test_a_dense_model_breaks_every_required_pattern(model: Path) -> None:
    for pattern in ("2:4", "columns"):
        found = inspect_checkpoint(model, require=pattern)
        assert len(found.violations) == len(found.layers) == 21


def test_outlier_rows_break_a_required_pattern(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = thanos.Recipe(
        pattern="2:4", outlier_rows=0.1, calibration=str(text_file), samples=2, sequence_length=32, device="cpu"
    )
    thanos.prune(tiny_llama, tmp_path / "out", recipe)
    found = inspect_checkpoint(tmp_path / "out", require="2:4")
    assert len(found.violations) == len(found.layers) == 21
    assert all("2:4" in layer.patterns and layer.outlier_rows == -(-layer.shape[0] // 10) for layer in found.layers)


def test_what_the_report_says_was_skipped_is_not_required(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = thanos.Recipe(
        pattern="2:4", skip=("down_proj",), calibration=str(text_file), samples=2, sequence_length=32, device="cpu"
    )
    thanos.prune(tiny_llama, tmp_path / "out", recipe)
    found = inspect_checkpoint(tmp_path / "out", require="2:4")
    assert found.violations == []
    reasons = {record.name: record.reason for record in found.dense}
    assert reasons["model.layers.0.mlp.down_proj.weight"] == "matched by skip"
    report = json.loads((tmp_path / "out/pruning.json").read_text())
    for key in (
        "parameters",
        "targeted_parameters",
        "zeros_targeted",
        "zeros_all",
        "sparsity_targeted",
        "sparsity_all",
    ):
        assert found.totals[key] == report["totals"][key], key


def test_gpt2s_transposed_weights_are_read_along_the_inputs(text_file: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "gpt2", "gpt-2")
    recipe = thanos.Recipe(pattern="2:4", calibration=str(text_file), samples=2, sequence_length=32, device="cpu")
    thanos.prune(model, tmp_path / "out", recipe)
    found = inspect_checkpoint(tmp_path / "out", require="2:4")
    assert found.violations == []
    assert {layer.name: layer.shape for layer in found.layers}["transformer.h.0.mlp.c_fc"] == (128, 32)


def test_json_is_stable(model: Path) -> None:
    values = inspect_checkpoint(model, require=None).to_dict()
    keys = ["schema", "model", "thanos_version", "require", "violations", "totals", "layers", "dense", "not_finite"]
    assert list(values) == keys
    assert values["schema"] == 1
    json.dumps(values, allow_nan=False)


def test_what_cannot_be_required(model: Path) -> None:
    with pytest.raises(RecipeError, match="N:M or columns"):
        inspect_checkpoint(model, require="unstructured")
    (model / "pruning.json").write_text("{}")
    with pytest.raises(ModelError, match="not a report"):
        inspect_checkpoint(model)


# --- NaN and infinity -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_and_infinity_are_counted_by_tensor(dtype: torch.dtype, model: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].to(dtype)
        tensors[f"{UP}.weight"][3, :5] = torch.nan
        tensors[f"{UP}.weight"][4, 2] = -torch.inf
        tensors["model.norm.weight"][0] = torch.inf

    edit(model, change)
    found = inspect_checkpoint(model)
    counted = {tensor.name: (tensor.nan, tensor.infinite, tensor.parameter) for tensor in found.not_finite}
    assert counted == {f"{UP}.weight": (5, 1, True), "model.norm.weight": (0, 1, True)}
    assert found.damaged == found.not_finite


def test_a_finite_tensor_whose_sum_overflows_is_not_damaged(model: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{UP}.weight"][:] = torch.finfo(torch.float32).max

    edit(model, change)
    assert inspect_checkpoint(model).not_finite == []


def test_a_mask_with_infinity_that_no_parameter_needs_is_counted_and_allowed(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.masked_bias"] = torch.full((3,), -torch.inf, dtype=torch.float16)

    edit(model, change)
    [mask] = inspect_checkpoint(model).not_finite
    assert (mask.nan, mask.infinite, mask.parameter) == (0, 3, False)
    assert run(["inspect", str(model), "--quiet"]) == 0
    shown = capsys.readouterr()
    assert re.search("NaN, infinity in parameters +none", shown.out)
    assert re.search("in other tensors +0 NaN, 3 infinite in 1 tensor; this is allowed", shown.out)
    assert shown.err == ""


def test_a_damaged_checkpoint_is_shown_and_exits_with_1(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(model), "--quiet"]) == 0
    assert re.search("NaN, infinity in parameters +none", capsys.readouterr().out)
    edit(model, lambda tensors: tensors[f"{UP}.weight"][3, :5].fill_(torch.nan))
    assert run(["inspect", str(model), "--quiet", "--json", "-"]) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["not_finite"] == [{"name": f"{UP}.weight", "nan": 5, "infinite": 0, "parameter": True}]
    assert shown.err.startswith(f"{UP}.weight: 5 NaN and 0 infinite entries; the checkpoint is damaged")
