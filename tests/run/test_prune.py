"""``thanos.prune`` from a folder to a folder: what is written, what is reported, and what is refused."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import thanos
from helpers import packed_windows, prose, save_tiny, windows
from thanos.calibration.windows import build_calibration
from thanos.checkpoint.reader import SafetensorsCheckpoint
from thanos.engine.stages import prune as engine_module
from thanos.errors import DataError, ModelError, NumericsError, RecipeError, ResourceError, UserError
from thanos.model.source import resolve_model
from thanos.run.work_folder import WorkFolder

SAMPLES, LENGTH = 4, 32
METHODS = ("thanos", "sparsegpt", "wanda", "magnitude", "admm")


def recipe(text: Path, **changes: Any) -> thanos.Recipe:
    return thanos.Recipe(
        **{"calibration": str(text), "samples": SAMPLES, "sequence_length": LENGTH, "device": "cpu"} | changes
    )


def raw_tensors(folder: Path) -> dict[str, tuple[str, str, list[int], bytes]]:
    """Every tensor of a folder as (file, dtype, shape, bytes), read by hand from the format's description."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                assert name not in tensors
                tensors[name] = (path.name, entry["dtype"], entry["shape"], data[start + first : start + last])
    return tensors


def read(folder: Path) -> dict[str, Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, hidden files too: path → content, None for folders."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, which a test may break."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture(scope="module")
def plain(tiny_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The output and the report of a plain run. Not to be modified."""
    out = tmp_path_factory.mktemp("plain") / "out"
    return out, thanos.prune(tiny_llama, out, recipe(text_file))


# --- the folder -----------------------------------------------------------------------------------------------------------


def test_the_folder_holds_a_checkpoint_a_report_a_recipe_and_a_card(plain, tiny_llama: Path) -> None:
    out, _ = plain
    given = {path.name for path in tiny_llama.iterdir()}
    assert {path.name for path in out.iterdir()} == given | {
        "pruning.json",
        "recipe.toml",
        "README.md",
        "events.jsonl",
        "run.json",
    }
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} <= given
    for name in given - {"model.safetensors"}:
        assert (out / name).read_bytes() == (tiny_llama / name).read_bytes(), name
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]


def test_everything_loads_with_transformers_alone(plain, tiny_llama: Path) -> None:
    out, _ = plain
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (out, tiny_llama))
    text = prose(20)
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    chat = [{"role": "user", "content": text}]
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False) == text
    assert GenerationConfig.from_pretrained(out).to_dict() == GenerationConfig.from_pretrained(tiny_llama).to_dict()
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    written = read(out)
    assert all(torch.equal(parameter, written[name]) for name, parameter in loaded.named_parameters())


def test_the_shards_are_those_of_the_input(text_file: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "dense", max_shard_size="20KB")
    files = sorted(path.name for path in folder.glob("*.safetensors*"))
    assert len(files) > 4
    thanos.prune(folder, tmp_path / "out", recipe(text_file))
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors*")) == files
    index = "model.safetensors.index.json"
    assert (tmp_path / "out" / index).read_bytes() == (folder / index).read_bytes()
    before, after = raw_tensors(folder), raw_tensors(tmp_path / "out")
    assert {k: v[:3] for k, v in after.items()} == {k: v[:3] for k, v in before.items()}
    thanos.prune(save_tiny(tmp_path / "whole"), tmp_path / "other", recipe(text_file))
    assert {k: v[3] for k, v in raw_tensors(tmp_path / "other").items()} == {k: v[3] for k, v in after.items()}
    ids = windows(1, 16)
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name)(input_ids=ids) for name in ("out", "other"))
    assert torch.equal(one.logits, other.logits)


def test_untouched_tensors_are_copied_byte_for_byte(plain, tiny_llama: Path) -> None:
    out, report = plain
    before, after = raw_tensors(tiny_llama), raw_tensors(out)
    pruned = {f"{layer.name}.weight" for layer in report.layers}
    assert len(pruned) == 21
    assert list(after) == list(before)
    for name in before:
        assert (after[name] == before[name]) is (name not in pruned), name
    assert {record.name for record in report.dense} == before.keys() - pruned


def test_the_model_folder_is_not_touched(model: Path, text_file: Path, tmp_path: Path) -> None:
    before = tree(model)
    thanos.prune(model, tmp_path / "out", recipe(text_file))
    assert tree(model) == before


def test_other_files_are_kept_and_other_formats_of_the_weights_are_not(
    model: Path, text_file: Path, tmp_path: Path
) -> None:
    (model / "LICENSE").write_text("a license")
    (model / "README.md").write_text("the dense model's card")
    (model / "pytorch_model.bin").write_bytes(b"dense weights")
    (model / "model.onnx").write_bytes(b"dense weights")
    (model / "M.GGUF").write_bytes(b"dense weights")
    thanos.prune(model, tmp_path / "out", recipe(text_file))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert (tmp_path / "out/LICENSE").read_text() == "a license"
    assert "the dense model's card" not in (tmp_path / "out/README.md").read_text()
    assert not names & {"pytorch_model.bin", "model.onnx", "M.GGUF"}


def test_out_may_be_an_empty_folder_and_its_parents_are_made(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    thanos.prune(tiny_llama, tmp_path / "empty", recipe(text_file, method="magnitude"))
    thanos.prune(tiny_llama, tmp_path / "new/deep/out", recipe(text_file, method="magnitude"))
    assert raw_tensors(tmp_path / "empty") == raw_tensors(tmp_path / "new/deep/out")


# --- every method and pattern ---------------------------------------------------------------------------------------------


def expected_zeros(rows: int, columns: int, pattern: str, sparsity: float, alpha: float) -> int:
    outliers = math.ceil(alpha * rows)
    if pattern == "2:4":
        return (rows - outliers) * columns // 2
    if pattern == "columns":  # ⌈p·b / (1 − α)⌉ columns of the rows that are not outliers
        return (rows - outliers) * math.ceil(round(sparsity * columns / (1 - alpha), 9))
    return math.floor(round(sparsity * rows * columns, 9))


@pytest.mark.parametrize("alpha", [0.0, 0.25])
@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.37), ("2:4", 0.5), ("columns", 0.4)])
@pytest.mark.parametrize("method", METHODS)
def test_exact_sparsity_and_report_of_every_method_and_pattern(
    method: str, pattern: str, sparsity: float, alpha: float, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    settings = recipe(text_file, method=method, pattern=pattern, sparsity=sparsity, outlier_rows=alpha)
    report = thanos.prune(tiny_llama, tmp_path / "out", settings)
    before, after = read(tiny_llama), read(tmp_path / "out")
    assert len(report.layers) == 21
    for layer in report.layers:
        dense, weight = before[f"{layer.name}.weight"], after[f"{layer.name}.weight"]
        rows, columns = layer.shape
        assert tuple(weight.shape) == (rows, columns)
        zeros = int((weight == 0).sum())
        assert zeros == expected_zeros(rows, columns, pattern, sparsity, alpha), layer.name
        assert (layer.zeros, layer.sparsity) == (zeros, zeros / weight.numel())
        assert (layer.method, layer.pattern, layer.dtype) == (method, pattern, "float32")
        assert torch.isfinite(weight).all()

        count = math.ceil(alpha * rows)
        identical = (weight == dense).all(1)
        assert layer.outlier_rows == count == int(identical.sum())
        rest = weight[~identical]
        if pattern == "2:4":
            assert ((rest.reshape(-1, 4) != 0).sum(1) == 2).all()
        if pattern == "columns":
            gone = (rest == 0).all(0)
            assert int(gone.sum()) * len(rest) == zeros
        changed = bool((weight != torch.where(weight == 0, 0.0, dense)).any())
        assert changed is (method in ("thanos", "sparsegpt", "admm"))
        if method in ("wanda", "magnitude"):
            assert layer.error_after_compensation == layer.error_before_compensation

    assert thanos.PruningReport.from_dict(json.loads((tmp_path / "out/pruning.json").read_text())) == report
    check_totals(report, tmp_path / "out")


def check_totals(report: thanos.PruningReport, out: Path) -> None:
    tensors = read(out)
    targeted = [f"{layer.name}.weight" for layer in report.layers]
    everything = sum(tensor.numel() for tensor in tensors.values())
    size = sum(tensors[name].numel() for name in targeted)
    zeros = sum(int((tensors[name] == 0).sum()) for name in targeted)
    zeros_all = sum(int((tensor == 0).sum()) for tensor in tensors.values())
    totals = report.totals
    assert totals["parameters"] == report.model["parameters"] == everything
    assert totals["targeted_parameters"] == size
    assert totals["zeros_targeted"] == zeros
    assert totals["zeros_all"] == zeros_all
    assert totals["sparsity_targeted"] == pytest.approx(zeros / size, rel=1e-12)
    assert totals["sparsity_all"] == pytest.approx(zeros_all / everything, rel=1e-12)
    for key in ("error_before_compensation", "error_after_compensation"):
        values = [getattr(layer, key) for layer in report.layers]
        assert totals[f"mean_{key}"] == pytest.approx(sum(values) / len(values), rel=1e-9)
    assert sum(record.parameters for record in report.dense) == everything - size


def test_totals_count_zeros_of_tensors_that_were_left_alone(model: Path, text_file: Path, tmp_path: Path) -> None:
    edit(model, lambda t: t["lm_head.weight"][:7].zero_())
    report = thanos.prune(model, tmp_path / "out", recipe(text_file))
    assert report.totals["zeros_all"] >= report.totals["zeros_targeted"] + 7 * 32
    check_totals(report, tmp_path / "out")


@pytest.mark.parametrize("method", METHODS)
def test_sparsity_zero_changes_nothing(method: str, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    report = thanos.prune(tiny_llama, tmp_path / "out", recipe(text_file, method=method, sparsity=0.0))
    assert raw_tensors(tmp_path / "out") == raw_tensors(tiny_llama)
    assert {layer.error_after_compensation for layer in report.layers} == {0.0}


# --- the report -----------------------------------------------------------------------------------------------------------


def test_the_report_is_the_file(plain) -> None:
    out, report = plain
    values = json.loads((out / "pruning.json").read_text(encoding="utf-8"))
    assert values == json.loads(report.to_json())
    assert thanos.PruningReport.from_dict(values) == report
    assert values["schema"] == 1


def test_the_report_says_what_ran(plain, tiny_llama: Path, text_file: Path) -> None:
    import hashlib

    import transformers

    _, report = plain
    assert report.thanos_version == thanos.__version__
    assert report.model["name"] == tiny_llama.name  # a published report says nothing of this machine
    assert report.model["architecture"] == "LlamaForCausalLM"
    assert report.versions["torch"] == torch.__version__
    assert report.versions["transformers"] == transformers.__version__
    assert thanos.Recipe.from_dict(report.recipe) == recipe(text_file, calibration=text_file.name)
    used = packed_windows(AutoTokenizer.from_pretrained(tiny_llama), text_file.read_text(), SAMPLES, LENGTH)
    digest = hashlib.sha256(b"(4, 32)" + used.numpy().astype("<i8").tobytes()).hexdigest()
    assert report.calibration == {
        "source": text_file.name,
        "rule": "packed",
        "seed": 0,
        "documents": 1,
        "samples": SAMPLES,
        "sequence_length": LENGTH,
        "tokens": SAMPLES * LENGTH,
        "bos_ids": [1],
        "sha256": digest,
        "text_sha256": hashlib.sha256(text_file.read_bytes()).hexdigest(),
    }


def test_time_and_memory_are_measured_by_phase(plain) -> None:
    _, report = plain
    assert set(report.phases) == {
        "load", "calibration", "statistics", "solve", "write", "propagate", "finish",
    }  # fmt: skip
    assert all(record.seconds > 0 and record.host_peak_bytes > 1e7 for record in report.phases.values())
    assert report.seconds == pytest.approx(sum(record.seconds for record in report.phases.values()))
    assert report.host_peak_bytes == max(record.host_peak_bytes for record in report.phases.values())
    assert report.device_peak_bytes is None


def test_reasons_for_what_was_left_dense(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    settings = recipe(
        text_file,
        skip=("layers.0.*",),
        overrides=(thanos.Override(match="layers.1.mlp.*", skip=True),),
    )
    report = thanos.prune(tiny_llama, tmp_path / "out", settings)
    reasons = {record.name: record.reason for record in report.dense}
    assert reasons["model.layers.0.mlp.up_proj.weight"] == "matched by skip"
    assert reasons["model.layers.1.mlp.up_proj.weight"] == "skipped by an override"
    assert reasons["lm_head.weight"] == "outside the decoder blocks"
    assert reasons["model.embed_tokens.weight"] == "not a linear layer's weight"
    assert reasons["model.norm.weight"] == "not a linear layer's weight"
    check_totals(report, tmp_path / "out")


# --- which layers, and how ------------------------------------------------------------------------------------------------


def changed(before: Path, after: Path) -> set[str]:
    one, other = raw_tensors(before), raw_tensors(after)
    return {name.removesuffix(".weight") for name in one if one[name] != other[name]}


def test_targets_and_skip_reach_the_written_weights(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    settings = recipe(text_file, targets=("mlp.*", "lm_head"), skip=("layers.2.mlp.up_proj", "gate_proj"))
    report = thanos.prune(tiny_llama, tmp_path / "out", settings)
    expected = {f"model.layers.{i}.mlp.{kind}_proj" for i in range(3) for kind in ("up", "down")} | {"lm_head"}
    expected -= {"model.layers.2.mlp.up_proj"}
    assert changed(tiny_llama, tmp_path / "out") == {layer.name for layer in report.layers} == expected
    head = read(tmp_path / "out")["lm_head.weight"]
    assert int((head == 0).sum()) == head.numel() // 2


def test_overrides_give_layers_another_method_and_pattern(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    overrides = (
        thanos.Override(match="*.down_proj", settings={"method": "wanda", "pattern": "2:4"}),
        thanos.Override(match="model.layers.1.mlp.*", settings={"sparsity": 0.25, "pattern": "unstructured"}),
        thanos.Override(match="q_proj", settings={"method": "magnitude", "outlier_rows": 0.25}),
        thanos.Override(match="layers.2.self_attn.*", skip=True),
    )
    report = thanos.prune(tiny_llama, tmp_path / "out", recipe(text_file, sparsity=0.4, overrides=overrides))
    got = {
        layer.name.removeprefix("model.layers."): (layer.method, layer.pattern, layer.outlier_rows)
        for layer in report.layers
    }
    assert got["0.mlp.down_proj"] == got["2.mlp.down_proj"] == ("wanda", "2:4", 0)
    assert got["1.mlp.down_proj"] == ("wanda", "unstructured", 0)
    assert got["1.mlp.up_proj"] == ("thanos", "unstructured", 0)
    assert got["0.self_attn.q_proj"] == ("magnitude", "unstructured", 8)
    assert got["0.self_attn.k_proj"] == ("thanos", "unstructured", 0)
    assert not any(name.startswith("2.self_attn") for name in got)
    tensors = {name.removeprefix("model.layers."): tensor for name, tensor in read(tmp_path / "out").items()}

    def zeros(name: str) -> int:
        return int((tensors[f"{name}.weight"] == 0).sum())

    assert zeros("0.mlp.down_proj") == 32 * 64 // 2
    assert zeros("1.mlp.down_proj") == zeros("1.mlp.up_proj") == 32 * 64 // 4
    assert zeros("0.mlp.up_proj") == math.floor(0.4 * 32 * 64)
    assert zeros("2.self_attn.k_proj") == 0
    stored = thanos.Recipe.from_toml(tmp_path / "out/recipe.toml").replace(calibration=str(text_file))
    again = thanos.prune(tiny_llama, tmp_path / "again", stored)
    assert thanos.Recipe.from_dict(again.recipe) == thanos.Recipe.from_dict(report.recipe)
    assert raw_tensors(tmp_path / "again") == raw_tensors(tmp_path / "out")


# --- runs after runs ------------------------------------------------------------------------------------------------------


def test_two_runs_give_the_same_bits(plain, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)  # whatever the global state
    thanos.prune(tiny_llama, tmp_path / "out", recipe(text_file))
    assert raw_tensors(tmp_path / "out") == raw_tensors(plain[0])


def test_the_recipe_beside_the_model_runs_again_to_the_same_bits(
    plain, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    stored = thanos.Recipe.from_toml(plain[0] / "recipe.toml")
    assert stored.calibration == text_file.name, "a local text has its name alone"
    thanos.prune(tiny_llama, tmp_path / "out", stored.replace(calibration=str(text_file)))
    assert raw_tensors(tmp_path / "out") == raw_tensors(plain[0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["unstructured", "columns"])
def test_pruning_further_keeps_the_zeros(
    method: str, pattern: str, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    settings = recipe(text_file, method=method, pattern=pattern)
    thanos.prune(tiny_llama, tmp_path / "half", settings.replace(sparsity=0.5))
    report = thanos.prune(tmp_path / "half", tmp_path / "more", settings.replace(sparsity=0.7))
    half, more = read(tmp_path / "half"), read(tmp_path / "more")
    for layer in report.layers:
        one, other = half[f"{layer.name}.weight"] == 0, more[f"{layer.name}.weight"] == 0
        assert not bool((one & ~other).any()), layer.name
        assert int(other.sum()) == expected_zeros(*layer.shape, pattern, 0.7, 0.0), layer.name
    assert json.loads((tmp_path / "more/pruning.json").read_text())["recipe"]["sparsity"] == 0.7


@pytest.mark.parametrize("method", METHODS)
def test_pruning_to_the_same_pattern_again_changes_nothing(
    method: str, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    settings = recipe(text_file, method=method, pattern="2:4")
    thanos.prune(tiny_llama, tmp_path / "one", settings)
    thanos.prune(tmp_path / "one", tmp_path / "two", settings)
    assert raw_tensors(tmp_path / "two") == raw_tensors(tmp_path / "one")


def test_n_m_on_top_of_unstructured_keeps_the_zeros(plain, text_file: Path, tmp_path: Path) -> None:
    report = thanos.prune(plain[0], tmp_path / "out", recipe(text_file, pattern="2:4"))
    half, both = read(plain[0]), read(tmp_path / "out")
    for layer in report.layers:
        one, other = half[f"{layer.name}.weight"] == 0, both[f"{layer.name}.weight"] == 0
        assert not bool((one & ~other).any())
        assert ((~other).reshape(-1, 4).sum(1) <= 2).all()


def test_the_models_own_text_as_calibration(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    settings = recipe(text_file, calibration="self")
    one = thanos.prune(tiny_llama, tmp_path / "one", settings)
    thanos.prune(tiny_llama, tmp_path / "two", settings)
    assert (one.calibration["rule"], one.calibration["tokens"]) == ("generated", SAMPLES * LENGTH)
    assert raw_tensors(tmp_path / "one") == raw_tensors(tmp_path / "two")


# --- overwriting ----------------------------------------------------------------------------------------------------------


def test_overwrite_replaces_the_whole_folder(plain, model: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    thanos.prune(model, out, recipe(text_file, method="magnitude"))
    (out / "stale.txt").write_text("from the run before")
    thanos.prune(model, out, recipe(text_file), overwrite=True)
    assert not (out / "stale.txt").exists()
    assert raw_tensors(out) == raw_tensors(plain[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_what_a_killed_run_left_is_cleared_away(plain, model: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial/model.safetensors").write_bytes(b"half a model")
    (tmp_path / ".out.partial/stale.txt").write_text("stale")
    thanos.prune(model, tmp_path / "out", recipe(text_file))
    assert raw_tensors(tmp_path / "out") == raw_tensors(plain[0])
    assert not (tmp_path / "out/stale.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


@pytest.fixture
def old(model: Path, text_file: Path, tmp_path: Path) -> Path:
    thanos.prune(model, tmp_path / "out", recipe(text_file, method="magnitude"))
    return tmp_path / "out"


def test_a_failed_run_leaves_the_old_folder_as_it_was(
    model: Path, old: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(tmp_path)
    break_solver(monkeypatch, MemoryError())
    with pytest.raises(ResourceError):
        thanos.prune(model, old, recipe(text_file), overwrite=True)
    assert besides_work(tmp_path) == before


def test_a_failed_last_rename_leaves_the_old_folder_as_it_was_and_all_the_work(
    model: Path, old: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(tmp_path)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.parent.name.endswith(".partial") and target == old:
            raise OSError(errno.EIO, "input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(OSError, match="input/output error"):
            thanos.prune(model, old, recipe(text_file), overwrite=True)
    assert besides_work(tmp_path) == before
    break_solver(monkeypatch, AssertionError("solved again"), after=0)
    thanos.prune(model, old, recipe(text_file), overwrite=True, resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    assert json.loads((old / "pruning.json").read_text())["recipe"]["method"] == "thanos"


def test_a_folder_that_came_into_being_meanwhile_is_not_replaced(model: Path, text_file: Path, tmp_path: Path) -> None:
    def watch(event: thanos.Event) -> None:
        if event.phase == "finish":
            (tmp_path / "out").mkdir(exist_ok=True)
            (tmp_path / "out/other.txt").write_text("somebody else's")

    with pytest.raises(UserError, match="was created during the run"):
        thanos.prune(model, tmp_path / "out", recipe(text_file), on_event=watch)
    assert tree(tmp_path / "out") == {"other.txt": b"somebody else's"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "model", "out"]
    (tmp_path / "out").rename(tmp_path / "other")
    thanos.prune(model, tmp_path / "out", recipe(text_file), resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "other", "out"]


# --- bad input: one line, and nothing written -------------------------------------------------------------------------------


def besides_work(folder: Path) -> dict[str, bytes | None]:
    """What :func:`tree` gives, but for what an interrupted run keeps beside ``out`` for the next."""
    return {path: data for path, data in tree(folder).items() if ".partial" not in path}


def refused(
    kind: type[Exception], model: Path, settings: thanos.Recipe, *facts: str, out: Path | None = None, **how: Any
) -> str:
    """Prune, expect a refusal whose one line holds all facts, and see that no file or folder came, went or changed."""
    root = model.parent
    before = tree(root)
    with pytest.raises(kind) as caught:
        thanos.prune(model, out or root / "out", settings, **how)
    message = str(caught.value)
    assert isinstance(caught.value, UserError)
    assert "\n" not in message
    assert message
    for fact in facts:
        assert fact in message, f"{fact!r} is not in {message!r}"
    assert tree(root) == before
    return message


def test_out_that_is_not_empty(model: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("five years of work")
    refused(UserError, model, recipe(text_file), str(tmp_path / "out"), "not empty", "--overwrite")
    message = refused(UserError, model, recipe(text_file), "not a model checkpoint", overwrite=True)
    assert "--overwrite" in message


def test_out_that_is_a_file(model: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    refused(UserError, model, recipe(text_file), "is a file")
    refused(UserError, model, recipe(text_file), "is a file", overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("where", [".", "sub", "sub/deeper", "..", "../model", "link"])
def test_out_in_or_around_the_model(where: str, overwrite: bool, model: Path, text_file: Path, tmp_path: Path) -> None:
    if where == "link":
        (tmp_path / "link").symlink_to(model)
        out = tmp_path / "link"
    else:
        out = model / where
    refused(UserError, model, recipe(text_file), "OUT", "model", out=out, overwrite=overwrite)


def test_a_parent_of_the_model_that_looks_like_a_checkpoint(model: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    refused(UserError, model, recipe(text_file), "holds the model", out=tmp_path, overwrite=True)


def test_the_folder_that_holds_a_gguf_file(text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(60))
    (tmp_path / "config.json").write_text("{}")
    refused(UserError, tmp_path / "m.gguf", recipe(text_file), "holds the model", out=tmp_path, overwrite=True)
    refused(UserError, tmp_path / "m.gguf", recipe(text_file), "inside the folder of another model")
    (tmp_path / "config.json").unlink()
    refused(ModelError, tmp_path / "m.gguf", recipe(text_file), "m.gguf", "truncated or corrupt")


def test_calibration_shorter_than_one_sequence(model: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text(prose(30))  # and BOS
    refused(
        DataError, model, recipe(short, samples=1), "shorter than one sequence", "30 tokens", "32", "of which the first"
    )
    short.write_text(prose(64))
    refused(DataError, model, recipe(short), "2 windows of 32 tokens", "--samples is 4")


def test_calibration_that_is_missing_or_unknown(model: Path, text_file: Path, tmp_path: Path) -> None:
    refused(DataError, model, recipe(tmp_path / "none.txt"), "none.txt", "does not exist")
    refused(DataError, model, recipe(text_file, calibration="wikitext3"), "'wikitext3' is unknown", "wikitext2")


def test_a_sequence_beyond_the_models_positions(model: Path, text_file: Path) -> None:
    settings = recipe(text_file, samples=1, sequence_length=257)
    refused(DataError, model, settings, "sequence_length 257", "256 positions", "256 or less")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layer", ["layers.0.self_attn.q_proj", "layers.1.self_attn.o_proj", "layers.2.mlp.down_proj"])
def test_a_weight_that_is_not_finite_is_named(
    layer: str, method: str, bad: float, model: Path, text_file: Path
) -> None:
    edit(model, lambda t: t[f"model.{layer}.weight"][3].fill_(bad))
    refused(NumericsError, model, recipe(text_file, method=method), layer, "NaN or infinity")


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.2.mlp.down_proj.weight"])
def test_a_weight_that_is_not_pruned_must_be_finite_too(name: str, model: Path, text_file: Path) -> None:
    # All lie behind every layer that is pruned, so no activation shows them; the model that is written would be broken.
    edit(model, lambda t: t[name][0].fill_(float("nan")))
    refused(NumericsError, model, recipe(text_file, skip=("down_proj",)), name.removesuffix(".weight"), "NaN")


def test_activations_that_are_not_finite_name_the_layer(model: Path, text_file: Path) -> None:
    edit(model, lambda t: t["model.layers.1.input_layernorm.weight"].fill_(3e38))
    refused(NumericsError, model, recipe(text_file), "layers.1.self_attn.q_proj", "NaN or infinity")


def test_activations_that_overflow_float16_name_the_layer_and_the_way_out(model: Path, text_file: Path) -> None:
    edit(model, lambda t: t["model.layers.1.mlp.up_proj.weight"].mul_(1e5))
    settings = recipe(text_file, dtype="float16", targets=("down_proj",))
    refused(NumericsError, model, settings, "layers.1.mlp.down_proj", "NaN or infinity", "--dtype")


def test_a_width_that_the_pattern_does_not_divide(text_file: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", intermediate_size=66)
    message = refused(RecipeError, folder, recipe(text_file, pattern="2:4"), "model.layers.0.mlp.down_proj", "66")
    assert "multiple of 4" in message
    thanos.prune(folder, tmp_path / "out", recipe(text_file, pattern="2:4", skip=("down_proj",)))


def test_an_impossible_budget_names_the_layer(model: Path, text_file: Path) -> None:
    settings = recipe(text_file, targets=("down_proj",), sparsity=0.965, outlier_rows=0.0334)
    refused(RecipeError, model, settings, "model.layers.0.mlp.down_proj", "outlier_rows", "32 × 64")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -5000])
def test_truncated_safetensors(keep: int, model: Path, text_file: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    message = refused(ModelError, model, recipe(text_file), "model.safetensors")
    assert "truncated" in message or "corrupt" in message


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'{"', b'["'),
        (b'"F32"', b'"F99"'),
        (b'"F32"', b'"F16"'),
        (b'"data_offsets":[0,', b'"data_offsets":[9,'),
        (b'"data_offsets"', b'"data_0ffsets"'),
        (b'"shape"', b'"sh\xffpe"'),
    ],
)
def test_a_header_with_a_flipped_byte(old: bytes, new: bytes, model: Path, text_file: Path) -> None:
    file = model / "model.safetensors"
    data = file.read_bytes()
    assert old in data
    file.write_bytes(data.replace(old, new, 1))
    refused(ModelError, model, recipe(text_file), "model.safetensors", "damaged")


@pytest.mark.parametrize("bit", range(8))
def test_a_header_length_with_a_flipped_bit(bit: int, model: Path, text_file: Path) -> None:
    file = model / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[1] ^= 1 << bit
    file.write_bytes(data)
    refused(ModelError, model, recipe(text_file), "model.safetensors", "damaged")


def test_a_renamed_tensor_is_not_replaced_by_random_numbers(model: Path, text_file: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"model.layers.1.mlp.up_proj", b"model.layers.1.mlp.uq_proj"))
    refused(ModelError, model, recipe(text_file), "model.layers.1.mlp.up_proj")


def test_a_missing_shard(text_file: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", max_shard_size="20KB")
    shard = sorted(folder.glob("*.safetensors"))[2]
    shard.unlink()
    refused(ModelError, folder, recipe(text_file), shard.name, "missing")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": {"a": "../../x"}}'])
def test_a_broken_index(text: bytes, text_file: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", max_shard_size="20KB")
    (folder / "model.safetensors.index.json").write_bytes(text)
    refused(ModelError, folder, recipe(text_file), "model.safetensors.index.json")


def test_a_missing_tokenizer(model: Path, text_file: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    refused(ModelError, model, recipe(text_file), "no tokenizer")


def test_a_broken_tokenizer(model: Path, text_file: Path) -> None:
    (model / "tokenizer.json").write_text('{"version": "1.0", "model"')
    refused(ModelError, model, recipe(text_file), "tokenizer")


def test_a_tokenizer_of_another_model(model: Path, text_file: Path) -> None:
    small = save_tiny(model.parent / "small", vocab_size=40)
    refused(DataError, small, recipe(text_file), "embeds only 40")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "no-such-model"}', "{}"])
def test_a_broken_config(text: str, model: Path, text_file: Path) -> None:
    (model / "config.json").write_text(text)
    refused(ModelError, model, recipe(text_file), "config")


def test_a_model_that_is_not_there(text_file: Path, tmp_path: Path) -> None:
    refused(ModelError, tmp_path / "none", recipe(text_file), "none", "does not exist")
    (tmp_path / "empty").mkdir()
    refused(ModelError, tmp_path / "empty", recipe(text_file), "no config.json")


def test_weights_in_pickles(model: Path, text_file: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    refused(ModelError, model, recipe(text_file), "pickle")


def test_code_that_comes_with_the_checkpoint(model: Path, text_file: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}, "model_type": "mine"}
    (model / "config.json").write_text(json.dumps(config))
    refused(ModelError, model, recipe(text_file), "--trust-remote-code")


def test_a_quantised_model(model: Path, text_file: Path) -> None:
    config = json.loads((model / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (model / "config.json").write_text(json.dumps(config))
    refused(ModelError, model, recipe(text_file), "quantised (gptq)")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_absent(model: Path, text_file: Path) -> None:
    refused(ResourceError, model, recipe(text_file, device="cuda"), "cuda", "--device cpu")


def test_a_glob_that_matches_nothing(model: Path, text_file: Path) -> None:
    refused(ModelError, model, recipe(text_file, targets=("qproj",)), "--targets 'qproj'", "q_proj")
    refused(ModelError, model, recipe(text_file, skip=("*",)), "leaves no layer")


# --- interrupted in the middle ----------------------------------------------------------------------------------------------


def break_solver(monkeypatch: pytest.MonkeyPatch, error: BaseException, after: int = 9) -> None:
    """Let the solver raise at its tenth layer, in the second block."""
    original, calls = engine_module.prune_layer, []

    def solver(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > after:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(engine_module, "prune_layer", solver)


@pytest.mark.parametrize(
    ("error", "facts"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), ("disk full", "free some space")),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"), ("device", "--samples", "now 4")),
        (MemoryError(), ("host", "--samples", "--sequence-length", "now 32")),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory:\nyou tried to allocate"), ("host", "--samples")),
    ],
    ids=["disk", "device", "host", "torch-host"],
)
def test_exhausted_resources_say_what_to_lower(
    error: Exception, facts: tuple[str, ...], model: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_solver(monkeypatch, error, after=0)
    refused(ResourceError, model, recipe(text_file), *facts)


def test_a_disk_without_room_is_noticed_before_the_work(
    model: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(model)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    break_solver(monkeypatch, AssertionError("work began"), after=0)
    refused(ResourceError, model, recipe(text_file), "disk full")
    # Nor have all tensors been read, or calibration text been made, which takes long for a large model.
    monkeypatch.setattr(SafetensorsCheckpoint, "chunks", lambda self, name: pytest.fail("tensors were read"))
    monkeypatch.setattr("thanos.calibration.windows.build_calibration", lambda *_, **__: pytest.fail("text was made"))
    refused(ResourceError, model, recipe(text_file), "disk full")


def test_a_work_folder_that_someone_deletes_during_the_run(model: Path, text_file: Path, tmp_path: Path) -> None:
    def watch(event: thanos.Event) -> None:
        if event.kind == "block" and event.block == 0:
            shutil.rmtree(tmp_path / ".out.partial")

    with pytest.raises(ResourceError, match=r"\.out\.partial was deleted during the run"):
        thanos.prune(model, tmp_path / "out", recipe(text_file), on_event=watch)
    assert list(tmp_path.iterdir()) == [model]


ENDS = [KeyboardInterrupt(), SystemExit(1), RuntimeError("a bug"), OSError(errno.EIO, "bad"), MemoryError()]


@pytest.mark.parametrize("error", ENDS)
def test_whatever_ends_a_run_before_a_block_is_finished_leaves_nothing(
    error: BaseException, model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(tmp_path)
    break_solver(monkeypatch, error, after=3)
    with pytest.raises(ResourceError if isinstance(error, MemoryError) else type(error)):
        thanos.prune(model, tmp_path / "new/deep/out", recipe(text_file))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("error", ENDS)
def test_whatever_ends_a_run_later_leaves_what_is_finished_and_nothing_else(
    error: BaseException, model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(tmp_path)
    break_solver(monkeypatch, error)
    with pytest.raises(ResourceError if isinstance(error, MemoryError) else type(error)) as caught:
        thanos.prune(model, tmp_path / "out", recipe(text_file))
    assert caught.value.__notes__ == ["1 of 3 blocks are finished; resume=True continues from them"]
    assert besides_work(tmp_path) == before
    assert (tmp_path / ".out.partial/model").is_dir()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="/proc")
def test_a_failed_run_leaves_no_file_open(
    model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_solver(monkeypatch, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        thanos.prune(model, tmp_path / "out", recipe(text_file))
    # Names, for what the interpreter holds open meanwhile is none of ours.
    held = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert [name for name in held if name.startswith(str(tmp_path))] == []


@pytest.mark.parametrize("phase", ["load", "calibration", "solve", "finish"])
def test_a_watcher_that_raises_ends_the_run_cleanly(phase: str, model: Path, text_file: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)

    def watch(event: thanos.Event) -> None:
        if event.phase == phase:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        thanos.prune(model, tmp_path / "out", recipe(text_file), on_event=watch)
    assert (besides_work if phase == "finish" else tree)(tmp_path) == before


def test_until_the_last_rename_nothing_has_the_name_of_the_output(
    model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    publish = WorkFolder.publish

    def spy(self: WorkFolder, **how: Any) -> None:
        out = tmp_path / "out"
        seen.append(out.exists())
        names = {path.name for path in self.model.iterdir()}
        assert {"pruning.json", "recipe.toml", "README.md", "config.json", "events.jsonl"} <= names
        assert self.path.name.startswith(".")
        assert self.path.parent == out.parent  # a rename within one file system
        publish(self, **how)
        seen.append(out.exists())

    def watch(event: thanos.Event) -> None:
        seen.append((tmp_path / "out").exists())
        if event.kind == "layer":  # nor could what a killed run leaves be loaded
            assert not (tmp_path / ".out.partial/model/config.json").exists()

    monkeypatch.setattr(WorkFolder, "publish", spy)
    thanos.prune(model, tmp_path / "out", recipe(text_file), on_event=watch)
    assert seen.pop()
    assert not any(seen)


def test_windows_made_before_give_the_same_bytes(tiny_llama: Path, text_file: Path, tmp_path: Path, plain) -> None:
    source = resolve_model(tiny_llama)
    tokenizer = source.tokenizer()
    settings = recipe(text_file)
    made = build_calibration(
        settings.calibration, tokenizer, samples=SAMPLES, sequence_length=LENGTH, seed=0, end_of_text_id=2
    )
    report = thanos.prune(tiny_llama, tmp_path / "out", settings, calibration=made)
    assert report.calibration == plain[1].calibration
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (plain[0] / "model.safetensors").read_bytes()
    for change in ({"seed": 1}, {"samples": 3}, {"sequence_length": 16}, {"calibration": "pydoc"}):
        with pytest.raises(DataError, match="the recipe says"):
            thanos.prune(tiny_llama, tmp_path / "other", settings.replace(**change), calibration=made)
    assert not (tmp_path / "other").exists()
