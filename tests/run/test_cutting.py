"""Runs that remove whole units: what is cut, what is left, how a run goes on, and what is refused before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import thanos
from helpers import ARCHITECTURES, MIXTURES, save_tiny, tiny_model, windows
from reports import contents
from thanos.calibration.windows import Calibration
from thanos.checkpoint.writer import CheckpointWriter
from thanos.cli import run
from thanos.cli.output import show_report
from thanos.errors import ModelError, UserError
from thanos.model.opening import OpenedModel
from thanos.registry import method_names
from thanos.run import cutting as cutting_module
from thanos.run.auxiliary_files import copy_auxiliary_files
from thanos.run.model_card import model_card
from thanos.run.split import error_at, splits
from thanos.run.unit_counts import remaining_units, runs_of
from thanos.shrink.writer import SmallerWriter
from thanos.solvers.allocation import Curve
from whole_models import LENGTH, SAMPLES, calibration_ids, prune_modules, recipe

WIDTH = 64  # neurons of the tiny models


def units(text: Path, **changes: Any) -> thanos.Recipe:
    return recipe(text, **{"pattern": "neurons", "sparsity": 0.25, "multiple_of": 8} | changes)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA with four query heads and two key-value heads."""
    return save_tiny(tmp_path_factory.mktemp("grouped") / "model", num_key_value_heads=2)


@pytest.fixture(scope="module")
def whole(tiny_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The output of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    thanos.prune(tiny_llama, out, units(text_file))
    return contents(out)


# --- what is cut ------------------------------------------------------------------------------------------------------


def test_the_written_model_is_the_one_pruned_block_by_block_without_its_zeros(
    tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    report = thanos.prune(tiny_llama, tmp_path / "out", units(text_file))
    written, dense = load_file(tmp_path / "out/model.safetensors"), load_file(tiny_llama / "model.safetensors")
    model = tiny_model()
    expected: dict[str, Tensor] = dict(dense)
    for block in range(3):
        name = f"model.layers.{block}.mlp.down_proj"
        modules = {name: model.get_submodule(name)}
        ids = calibration_ids(tiny_llama, text_file)
        prune_modules(model, modules, ids, expected, None, pattern="neurons", sparsity=0.25)
        stays = (expected[f"{name}.weight"] != 0).any(0)
        assert (~stays).nonzero().flatten().tolist() == report.layers[block].removed_units
        prefix = f"model.layers.{block}.mlp"
        torch.testing.assert_close(
            written[f"{name}.weight"], expected[f"{name}.weight"][:, stays], rtol=1e-3, atol=1e-5
        )
        for maker in ("gate_proj", "up_proj"):
            assert torch.equal(written[f"{prefix}.{maker}.weight"], dense[f"{prefix}.{maker}.weight"][stays])
    unchanged = [name for name in dense if ".mlp." not in name]
    assert unchanged
    assert all(torch.equal(written[name], dense[name]) for name in unchanged)


def test_the_report_counts_what_went_exactly(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    report = thanos.prune(tiny_llama, tmp_path / "out", units(text_file))
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).num_parameters() for folder in (tiny_llama, tmp_path / "out")
    )
    cut = report.cut
    assert (cut["parameters_before"], cut["parameters_after"]) == (before, after)
    assert before - after == 3 * 16 * 3 * 32  # blocks, neurons, matrices, hidden size
    assert cut["units"] == {"neurons": {"before": WIDTH, "after": 48}}
    assert cut["asked"] == 0.25
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tiny_llama, tmp_path / "out")]
    assert [cut["bytes_before"], cut["bytes_after"]] == sizes
    assert all(len(layer.removed_units or []) == 16 for layer in report.layers)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["intermediate_size"] == 48
    again = thanos.PruningReport.read(tmp_path / "out/pruning.json")
    assert again == report


def test_the_card_says_what_went(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    report = thanos.prune(tiny_llama, tmp_path / "out", units(text_file))
    card = model_card(report)
    assert (tmp_path / "out/README.md").read_text() == card
    assert "48 of 64 neurons" in card
    assert f"{report.cut['parameters_after']:,}" in card
    assert "the files are as large as before" not in card
    assert "- sparse" not in card
    assert "outlier rows" not in card
    assert "| units left are a multiple of | 8 |" in card


@pytest.mark.parametrize(("unit", "heads", "keys"), [("group", 2, 1), ("query", 2, 2)])
def test_heads_go_in_groups_or_one_of_every_group(
    unit: str, heads: int, keys: int, grouped: Path, text_file: Path, tmp_path: Path
) -> None:
    made = recipe(text_file, pattern="heads", sparsity=0.5, head_unit=unit)
    report = thanos.prune(grouped, tmp_path / "out", made)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (heads, keys, 8)
    assert report.cut["units"] == {"heads": {"before": 2, "after": 1}}
    assert report.cut["head_unit"] == unit
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    dense, written = load_file(grouped / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    for block, layer in enumerate(report.layers):
        (gone,) = layer.removed_units or []
        rows = torch.arange(32).view(2, 2, 8)
        stay = (rows[1 - gone] if unit == "group" else rows[:, 1 - gone]).flatten()
        name = f"model.layers.{block}.self_attn"
        assert torch.equal(written[f"{name}.q_proj.weight"], dense[f"{name}.q_proj.weight"][stay])
    assert model(torch.arange(4)[None]).logits.isfinite().all()


@pytest.mark.parametrize("method", method_names())
def test_every_method_removes_as_many_from_every_block(
    method: str, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    report = thanos.prune(tiny_llama, tmp_path / "out", units(text_file, method=method))
    assert {layer.method for layer in report.layers} == {method}
    assert [len(layer.removed_units or []) for layer in report.layers] == [16] * 3
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.intermediate_size == 48


@pytest.mark.parametrize("settings", [{"effort": "high"}, {"effort": "max", "tune": 2}, {"sequential": True}])
def test_the_repair_works_with_units(
    settings: dict[str, Any], tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    report = thanos.prune(tiny_llama, tmp_path / "out", units(text_file, **settings))
    written = load_file(tmp_path / "out/model.safetensors")
    for block in range(3):
        assert written[f"model.layers.{block}.mlp.down_proj.weight"].shape == (32, 48)
        assert bool((written[f"model.layers.{block}.mlp.down_proj.weight"] != 0).all())
    card = (tmp_path / "out/README.md").read_text()
    assert ("blocks were then tuned towards" in card) == (settings.get("effort") == "max")
    assert "zeros fixed" not in card
    if "effort" in settings:
        assert [layer.dense_target is not None for layer in report.layers] == [True] * 3
        for errors in report.block_errors:
            *_, first, last = [errors.errors["dense"], *errors.errors.values()]
            assert last is not None
            assert first is not None


def test_every_expert_loses_as_many_neurons(text_file: Path, tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "model", "qwen3-moe")
    before = AutoModelForCausalLM.from_pretrained(dense).config.moe_intermediate_size
    report = thanos.prune(dense, tmp_path / "out", units(text_file, sparsity=1 / 3))
    gone = {len(layer.removed_units or []) for layer in report.layers}
    assert gone == {before // 3}
    assert len({layer.name.rpartition(".")[0] for layer in report.layers}) == len(report.layers) > 3
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert after.config.moe_intermediate_size == before - before // 3
    assert after(torch.arange(4)[None]).logits.isfinite().all()


def keep_full_size(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let the next run also write all its tensors at full size, as a run with another pattern does."""
    folder.mkdir()
    full: list[CheckpointWriter] = []

    class Both(SmallerWriter):
        def __init__(self, opened: OpenedModel, *given: Any, **named: Any) -> None:
            super().__init__(opened, *given, **named)
            full.append(CheckpointWriter(opened.checkpoint.layout, opened.checkpoint, folder))
            copy_auxiliary_files(opened, folder)

        def write(self, name: str, tensor: Tensor) -> None:
            super().write(name, tensor)
            full[0].write(name, tensor)

        def finish(self) -> None:
            super().finish()
            full[0].finish()

    monkeypatch.setattr(cutting_module, "SmallerWriter", Both)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_smaller_model_gives_the_logits_of_the_zeroed_one(
    architecture: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = save_tiny(tmp_path / "model", architecture)
    keep_full_size(monkeypatch, tmp_path / "zeroed")
    # Given windows, because transformers reads every Qwen2 tokenizer as byte-level BPE.
    given = Calibration(windows(SAMPLES, LENGTH), str(text_file), "packed", 0, 1)
    report = thanos.prune(dense, tmp_path / "out", units(text_file, effort="high"), calibration=given)
    ids = torch.arange(1, 40)[None]
    with torch.inference_mode():
        zeroed, smaller, before = (
            AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits
            for folder in (tmp_path / "zeroed", tmp_path / "out", dense)
        )
    torch.testing.assert_close(smaller, zeroed, rtol=1e-5, atol=1e-5 * float(zeroed.abs().max()))
    assert not torch.allclose(smaller, before, rtol=1e-3)
    assert report.cut["parameters_after"] < report.cut["parameters_before"]


# --- how a run goes on ------------------------------------------------------------------------------------------------


class Stop(Exception):  # noqa: N818  it is a signal, not an error
    """Ends a run in a test."""


def stopped(model: Path, out: Path, settings: thanos.Recipe, when: Any, **how: Any) -> Path:
    def watch(event: thanos.Event) -> None:
        if when(event):
            raise Stop

    with pytest.raises(Stop):
        thanos.prune(model, out, settings, on_event=watch, **how)
    assert not out.exists()
    return out.parent / f".{out.name}.partial"


@pytest.mark.parametrize("block", range(3))
def test_a_resumed_run_gives_the_same_bytes(
    block: int, whole: Any, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    stopped(
        tiny_llama, out, units(text_file), lambda event: event.kind == "layer" and event.block == block, resume=True
    )
    thanos.prune(tiny_llama, out, units(text_file), resume=True)
    assert contents(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("qwen3", {"pattern": "heads", "sparsity": 0.5, "multiple_of": None}),
        ("qwen2", {"pattern": "heads", "sparsity": 0.5, "multiple_of": None, "head_unit": "query"}),
        ("phi-3", {}),
        ("mixtral", {}),
    ],
)
def test_a_resumed_run_cuts_tuned_tensors_to_the_same_bytes(
    architecture: str, changes: dict[str, Any], text_file: Path, tmp_path: Path
) -> None:
    """The rows of a removed unit, which tuning left in the interrupted run, are zeros in the resumed one."""
    dense = save_tiny(tmp_path / "model", architecture)
    given = Calibration(windows(SAMPLES, LENGTH), str(text_file), "packed", 0, 1)
    made = units(text_file, **{"effort": "max", "tune": 1} | changes)
    thanos.prune(dense, tmp_path / "whole", made, calibration=given)
    out = tmp_path / "out"
    stopped(dense, out, made, lambda event: event.kind == "stage" and event.block == 1, calibration=given)
    thanos.prune(dense, out, made, calibration=given, resume=True)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_run_that_ended_while_the_smaller_model_was_written_goes_on(
    whole: Any, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for done in (1, 3):
        work = stopped(
            tiny_llama,
            out,
            units(text_file),
            lambda event, done=done: event.phase == "finish" and event.done == done,
            resume=True,
        )
        assert not (work / "cut").exists()
    thanos.prune(tiny_llama, out, units(text_file), resume=True)
    assert contents(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_that_ended_before_it_published_only_publishes(
    whole: Any, tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("thanos.run.work_folder.WorkFolder.publish", stop)
        with pytest.raises(Stop):
            thanos.prune(tiny_llama, out, units(text_file))
    with pytest.raises(UserError, match="--resume"):
        thanos.prune(tiny_llama, out, units(text_file))
    with pytest.raises(UserError, match="not the run"):
        thanos.prune(tiny_llama, out, units(text_file, sparsity=0.5), resume=True)
    monkeypatch.setattr("thanos.engine.stages.prune.prune_layer", stop)
    thanos.prune(tiny_llama, out, units(text_file), resume=True)
    assert contents(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    thanos.prune(tiny_llama, out, units(text_file), resume=True)  # complete: nothing to do
    assert contents(out) == whole


def stop(*_: Any, **__: Any) -> None:
    raise Stop


def test_a_plan_predicts_the_room_for_the_smaller_model_alone(
    tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    plan = thanos.plan(tiny_llama, tmp_path / "out", units(text_file))
    plain = thanos.plan(tiny_llama, tmp_path / "out", recipe(text_file, targets=("*.down_proj",)))
    assert plan.layers == plain.layers == 3
    assert plan.disk_besides_bytes == plain.disk_besides_bytes
    thanos.prune(tiny_llama, tmp_path / "out", units(text_file))
    assert plan.disk_bytes == (tmp_path / "out/model.safetensors").stat().st_size < plain.disk_bytes


@pytest.mark.parametrize(
    "changes", [{}, {"effort": "max", "tune": 1}, {"pattern": "blocks", "sparsity": 0.34, "multiple_of": None}]
)
def test_a_run_never_holds_more_on_the_disk_than_the_smaller_model(
    changes: dict[str, Any], tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    out, seen = tmp_path / "out", list[int]()

    def watch(event: thanos.Event) -> None:
        del event
        seen.append(sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")))

    report = thanos.prune(tiny_llama, out, units(text_file, **changes), on_event=watch)
    assert max(seen) == report.cut["bytes_after"] < report.cut["bytes_before"]
    assert (out / "model.safetensors").stat().st_size == report.cut["bytes_after"]


def test_a_damaged_tensor_of_an_interrupted_run_is_cut_again(
    whole: Any, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    work = stopped(tiny_llama, out, units(text_file), lambda event: event.kind == "block" and event.block == 1)
    shard, name = work / "model/model.safetensors", "model.layers.0.mlp.down_proj.weight"
    with shard.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        first, last = json.loads(file.read(length))[name]["data_offsets"]
        file.seek(8 + length + first)
        file.write(b"\1" * (last - first))
    notes = list[str]()
    thanos.prune(tiny_llama, out, units(text_file), resume=True, on_event=lambda event: notes.append(event.message))
    assert sum("differs from what was written" in note for note in notes) == 1
    assert contents(out) == whole


# --- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "share", "multiple", "stays"),
    [
        (1536, 0.2, 64, 1216),  # 1228.8 is nearer to 19 · 64 than to 20 · 64
        (1536, 0.2, 256, 1280),
        (1536, 0.2, 1, 1229),
        (14336, 0.25, 64, 10752),
        (9, 0.2, 1, 7),
        (3, 0.2, 1, 2),
        (8, 0.5, 4, 4),
    ],
)
def test_the_units_that_stay_are_the_nearest_multiple(count: int, share: float, multiple: int, stays: int) -> None:
    assert remaining_units(count, share, multiple, "neurons") == stays


@pytest.mark.parametrize(
    ("count", "share", "multiple", "words"),
    [
        (64, 0.2, 64, "nearest multiple of 64 is 64; no multiple of it is between 0 and 64; lower multiple_of"),
        (1536, 0.01, 64, "from 64 to 1472 of them may remain; change sparsity or multiple_of"),
        (1536, 0.99, 64, "nearest multiple of 64 is 0"),
        (100, 0.001, 64, "; 64 of them may remain"),
        (4, 0.1, 1, "rounds to all of them; from 1 to 3 of them may be removed; change sparsity"),
        (4, 0.9, 1, "rounds to none"),
        (2, 0.1, 1, "; 1 of them may be removed"),
        (1, 0.5, 1, "only one, which must remain"),
    ],
)
def test_budgets_of_none_or_all_are_refused(count: int, share: float, multiple: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        remaining_units(count, share, multiple, "heads")


def test_the_runs_of_columns_are_found() -> None:
    columns = torch.arange(24)
    assert runs_of(columns[:, None]) == 1
    assert runs_of(columns.view(4, 6)) == 1
    assert runs_of(columns.view(2, 4, 3).transpose(0, 1).reshape(4, 6)) == 2
    with pytest.raises(UserError):
        runs_of(columns.view(6, 4).flip(0))


# --- refused before any work ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--sparsity", "0"], "removes nothing"),
        (["--sparsity", "0.99"], "nearest multiple of 64 is 0"),
        (["--multiple-of", "0"], "multiple_of must be"),
        (["--multiple-of", "128"], "multiple of 128"),
        (["--outlier-rows", "0.1"], "outlier_rows"),
        (["--keep-budget"], "keep_budget has no meaning for pattern neurons"),
        (["--block-size", "64"], "block_size 64 has no meaning for pattern neurons"),
        (["--pattern", "blocks", "--sparsity", "0.4", "--block-size", "64"], "block_size 64 has no meaning"),
        (["--pattern", "width", "--keep-budget"], "keep_budget has no meaning for pattern width"),
        (["--targets", "*.down_proj"], "targets contradicts"),
        (["--skip", "*.down_proj"], "skip contradicts"),
        (["--scope", "row"], "scope"),
        (["--allocation", "error"], "allocation"),
        (["--head-unit", "group"], "head_unit has no meaning"),
        (["--pattern", "heads", "--head-unit", "pair"], "group or query"),
        (["--pattern", "heads", "--sparsity", "0.05"], "from 1 to 3 of them may be removed"),
        (["--pattern", "heads", "--sparsity", "0.95"], "from 1 to 3 of them may be removed"),
        (["--pattern", "heads:2"], "single matrix"),
        (["--pattern", "unstructured", "--multiple-of", "8"], "multiple_of has no meaning"),
    ],
)
def test_what_units_exclude_is_one_line(
    flags: list[str], words: str, tiny_llama: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = ["--calibration", str(text_file), "--samples", str(SAMPLES), "--sequence-length", str(LENGTH)]
    pattern = [] if "--pattern" in flags else ["--pattern", "neurons"]
    code = run(
        ["prune", str(tiny_llama), str(tmp_path / "out"), "--quiet", "--device", "cpu", *fixed, *pattern, *flags]
    )
    error = capsys.readouterr().err.strip()
    assert code == 2
    assert words in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("unit", "keys", "words"),
    [
        ("group", 2, "of 2 groups of heads with one key-value head in each block, sparsity 0.1 leaves 1.8"),
        ("query", 2, "of 2 query heads of every group in each block, sparsity 0.1 leaves 1.8"),
        ("group", 1, "one key-value head, which must stay with its query heads; give head_unit query"),
        ("group", 4, "of 4 heads in each block"),
    ],
)
def test_an_impossible_number_of_heads_is_told_in_units_that_go(
    unit: str, keys: int, words: str, text_file: Path, tmp_path: Path
) -> None:
    model = save_tiny(tmp_path / "model", num_key_value_heads=keys)
    made = recipe(text_file, pattern="heads", sparsity=0.1, head_unit=unit)
    with pytest.raises(UserError, match=words):
        thanos.prune(model, tmp_path / "out", made)


@pytest.mark.parametrize("pattern", ["neurons", "heads", "width", "blocks"])
def test_a_loaded_model_cannot_become_smaller_in_place(pattern: str) -> None:
    with pytest.raises(UserError, match="cannot be done in place"):
        thanos.prune_model(tiny_model(), recipe=thanos.Recipe(pattern=pattern))


@pytest.mark.parametrize("setting", [{"sparsity": 0.1}, {"pattern": "unstructured"}, None])
def test_an_override_must_not_make_blocks_unequal(setting: dict[str, Any] | None, text_file: Path) -> None:
    from thanos.recipe.override import Override

    one = Override(match="*.down_proj", skip=setting is None, settings=setting or {})
    with pytest.raises(UserError, match="removes the same number of units from every block"):
        units(text_file, overrides=(one,))
    with pytest.raises(UserError, match="the recipe's own pattern"):
        recipe(text_file, overrides=(Override(match="*.down_proj", settings={"pattern": "neurons"}),))


@pytest.mark.parametrize("setting", [{"block_size": 64}, {"keep_budget": True}, {"outlier_rows": 0.1}])
def test_an_override_must_not_set_what_units_do_not_use(setting: dict[str, Any], text_file: Path) -> None:
    from thanos.recipe.override import Override

    with pytest.raises(UserError, match=f"{next(iter(setting))} .*pattern neurons"):
        units(text_file, overrides=(Override(match="*.down_proj", settings=setting),))


def test_an_override_may_change_the_damping(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    from thanos.recipe.override import Override

    one = Override(match="*.layers.0.*.down_proj", settings={"damping": 0.1})
    report = thanos.prune(tiny_llama, tmp_path / "out", units(text_file, overrides=(one,)))
    assert [layer.damping for layer in report.layers] == [0.1, 0.01, 0.01]


def test_an_unknown_architecture_is_refused_before_the_calibration(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path
) -> None:
    def refuse(*_: Any) -> Any:
        raise UserError("no such units")

    monkeypatch.setattr(cutting_module, "units_of", refuse)
    monkeypatch.setattr("thanos.run.prune.calibrate", stop)
    with pytest.raises(UserError, match="no such units"):
        thanos.prune(tiny_llama, tmp_path / "out", units(text_file))
    assert not list(tmp_path.iterdir())


# --- width: one split between neurons and heads -----------------------------------------------------------------------


def test_a_split_comes_as_near_to_the_share_as_whole_units_allow() -> None:
    counts, sizes = {"neurons": 64, "heads": 4}, {"neurons": 10, "heads": 170}

    def refuse_two(removed: Any) -> None:
        if removed["heads"] == 2:
            raise ModelError("two")

    found = splits(counts, sizes, 400.0, 4, refuse_two)
    assert found == [{"neurons": 40, "heads": 0}, {"neurons": 24, "heads": 1}]
    assert all(abs(10 * one["neurons"] + 170 * one["heads"] - 400) <= 4 / 2 * 10 for one in found)

    def refuse(_: Any) -> None:
        raise ModelError("the first reason")

    with pytest.raises(ModelError, match="the first reason"):
        splits(counts, sizes, 340.0, 4, refuse)
    with pytest.raises(
        UserError, match="no split of whole heads and a multiple of 64 neurons removes 2,000 parameters"
    ):
        splits(counts, sizes, 2000.0, 64, refuse_two)


@pytest.mark.parametrize("target", [1.0, 50.0, 85.0])
def test_a_target_below_half_of_the_smallest_split_is_refused(target: float) -> None:
    """Half of 64 neurons have 320 parameters and a head 170: to remove nothing is nearer to the target than a head is."""
    with pytest.raises(UserError, match="no split of whole heads"):
        splits({"neurons": 64, "heads": 4}, {"neurons": 10, "heads": 170}, target, 64, lambda _: None)
    assert splits({"neurons": 64, "heads": 4}, {"neurons": 10, "heads": 170}, 86.0, 64, lambda _: None) == [
        {"neurons": 0, "heads": 1}
    ]


def test_the_split_of_the_least_predicted_error_is_taken(grouped: Path, text_file: Path, tmp_path: Path) -> None:
    made = recipe(text_file, pattern="width", sparsity=0.3, multiple_of=1)
    report = thanos.prune(grouped, tmp_path / "out", made)
    ranked = report.cut["split"]["splits"]
    assert len(ranked) == 2
    assert [one["predicted_error"] for one in ranked] == sorted(one["predicted_error"] for one in ranked)
    removed = ranked[0]["removed"]
    for kind, size in report.cut["units"].items():
        assert size["before"] - size["after"] == removed[kind]
    assert report.cut["share_of_block_parameters"] == pytest.approx(0.3, abs=0.01)
    for layer in report.layers:
        kind = "neurons" if layer.name.endswith("down_proj") else "heads"
        assert len(layer.removed_units or []) == removed[kind] > 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.intermediate_size == WIDTH - removed["neurons"]


@pytest.mark.parametrize(("pattern", "damage"), [("width", ""), ("blocks", "{")])
def test_a_damaged_choice_is_made_again(
    pattern: str, damage: str, grouped: Path, text_file: Path, tmp_path: Path
) -> None:
    multiple = 8 if pattern == "width" else None
    out, made = tmp_path / "out", units(text_file, pattern=pattern, sparsity=0.34, multiple_of=multiple)
    thanos.prune(grouped, tmp_path / "whole", made)
    work = stopped(grouped, out, made, lambda event: event.phase == "finish")
    assert (work / "allocation.json").is_file()
    (work / "allocation.json").write_text(damage)
    thanos.prune(grouped, out, made, resume=True)
    assert contents(out) == contents(tmp_path / "whole")


def test_an_error_between_two_measured_shares_is_their_geometric_mean() -> None:
    curve = Curve(10, (0.2, 0.4), (0.01, 0.04))
    assert error_at(curve, 0.3) == pytest.approx(0.02)
    assert [error_at(curve, share) for share in (0.0, 0.1, 0.2, 0.4, 0.5)] == pytest.approx(
        [0, 0.005, 0.01, 0.04, 0.08]
    )


@pytest.mark.parametrize("where", ["split", "block"])
def test_a_resumed_run_keeps_its_split(
    where: str, grouped: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(text_file, pattern="width", sparsity=0.3, multiple_of=1)
    thanos.prune(grouped, tmp_path / "whole", made)
    out = tmp_path / "out"
    stopped(grouped, out, made, lambda event: event.kind == "layer" and event.block == 1)
    monkeypatch.setattr("thanos.run.allocation.MeasureStage", stop)
    thanos.prune(grouped, out, made, resume=True)
    assert contents(out) == contents(tmp_path / "whole")


# --- blocks -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("deep") / "model", num_hidden_layers=6)


def states(folder: Path, ids: Tensor, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Inputs of every block, and the last outputs before the norm, each (tokens, d)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    found: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(0, 1)))
    model.model.layers[-1].register_forward_hook(lambda _, __, out: found.append(out.flatten(0, 1)))
    with torch.inference_mode():
        model(ids)
    return found


def test_only_the_blocks_that_go_are_missing(deep: Path, text_file: Path, tmp_path: Path) -> None:
    report = thanos.prune(deep, tmp_path / "out", recipe(text_file, pattern="blocks", sparsity=0.34))
    dropped = report.cut["dropped_blocks"]
    assert len(dropped) == 2
    assert report.cut["units"] == {"blocks": {"before": 6, "after": 4}}
    dense, written = load_file(deep / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    stay = [index for index in range(6) if index not in dropped]
    for new, old in enumerate(stay):  # without a repair nothing else changes
        for name in ("mlp.down_proj", "self_attn.q_proj"):
            assert torch.equal(written[f"model.layers.{new}.{name}.weight"], dense[f"model.layers.{old}.{name}.weight"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 4


def test_no_layer_error_is_told_where_blocks_go(
    deep: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The layer before them is fitted to their outputs, so it departs from its own outputs on purpose."""
    made = recipe(text_file, pattern="blocks", sparsity=0.34, effort="max", tune=1)
    report = thanos.prune(deep, tmp_path / "out", made)
    card = (tmp_path / "out/README.md").read_text()
    show_report(report, tmp_path / "out")
    assert report.layers
    assert "relative error of block" in card
    for words in (card.lower(), capsys.readouterr().out.lower()):
        assert "layer error" not in words
        assert "layers with the largest error" not in words
        assert "errors of the layers below" not in words


def test_the_layer_before_is_fitted_to_the_outputs_of_the_blocks_that_go(
    deep: Path, text_file: Path, tmp_path: Path
) -> None:
    made = recipe(text_file, pattern="blocks", sparsity=0.34, dense_target=1.0, damping=0.02)
    report = thanos.prune(deep, tmp_path / "out", made)
    dropped = report.cut["dropped_blocks"]
    assert dropped == [4, 5]
    before = 3
    assert [layer.name for layer in report.layers] == [f"model.layers.{before}.mlp.down_proj"]
    ids = calibration_ids(deep, text_file)
    wanted = states(deep, ids)[-1]
    model = AutoModelForCausalLM.from_pretrained(deep, dtype=torch.float64).eval()
    seen: dict[str, Tensor] = {}
    block = model.model.layers[before]
    block.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].flatten(0, 1)))
    block.post_attention_layernorm.register_forward_pre_hook(lambda _, args: seen.update(r=args[0].flatten(0, 1)))
    with torch.inference_mode():
        model(ids)
    gram = seen["x"].T @ seen["x"]
    ridge = 0.02 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    weight = block.mlp.down_proj.weight.detach()
    # ‖Y − X Vᵀ‖² + λ‖V − W‖² with Y = h* − r
    expected = torch.linalg.solve(gram + ridge, seen["x"].T @ (wanted - seen["r"]) + ridge @ weight.T).T
    got = load_file(tmp_path / "out/model.safetensors")[f"model.layers.{before}.mlp.down_proj.weight"]
    torch.testing.assert_close(got.double(), expected, rtol=2e-3, atol=2e-4)
    errors = report.block_errors[-1].errors
    assert (errors["prune"] or 0.0) < 0.5 * (errors["dense"] or 0.0)


@pytest.mark.parametrize("settings", [{"effort": "high"}, {"effort": "max", "tune": 2}])
def test_a_run_that_drops_blocks_resumes_to_the_same_bytes(
    settings: dict[str, Any], deep: Path, text_file: Path, tmp_path: Path
) -> None:
    made = recipe(text_file, pattern="blocks", sparsity=0.34, **settings)
    report = thanos.prune(deep, tmp_path / "whole", made)
    for errors in report.block_errors[-1:]:
        *_, last = errors.errors.values()
        assert (last or 0.0) < (errors.errors["dense"] or 0.0)
    for block in (1, 3):
        out = tmp_path / f"out{block}"
        stopped(deep, out, made, lambda event, block=block: event.kind == "stage" and event.block == block)
        thanos.prune(deep, out, made, resume=True)
        assert contents(out) == contents(tmp_path / "whole")


def test_scattered_blocks_go_too(deep: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thanos.run.allocation.chosen_blocks", lambda *_: {"dropped": [1, 3, 4]})
    report = thanos.prune(deep, tmp_path / "out", recipe(text_file, pattern="blocks", sparsity=0.5, dense_target=1.0))
    assert [layer.block for layer in report.layers] == [0, 2]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert model.config.num_hidden_layers == 3
    plain = AutoModelForCausalLM.from_pretrained(deep).eval()
    plain.model.layers = torch.nn.ModuleList([plain.model.layers[index] for index in (0, 2, 5)])
    for number, layer in enumerate(plain.model.layers):
        setattr(layer.self_attn, "layer_idx", number)  # noqa: B010, unknown to the type checker
    ids = calibration_ids(deep, text_file)
    dense = AutoModelForCausalLM.from_pretrained(deep).eval()
    with torch.inference_mode():
        wanted, fitted, dropped = (one(ids, use_cache=False).logits for one in (dense, model, plain))
    assert (fitted - wanted).square().mean() < (dropped - wanted).square().mean()


def test_all_blocks_cannot_go(deep: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="from 1 to 5 of them may be removed"):
        thanos.prune(deep, tmp_path / "out", recipe(text_file, pattern="blocks", sparsity=0.95))
    with pytest.raises(UserError, match="from 1 to 5 of them may be removed"):
        thanos.prune(deep, tmp_path / "out", recipe(text_file, pattern="blocks", sparsity=0.05))


@pytest.mark.parametrize(
    ("number", "words"), [(1, "block 3 is removed: it changes"), (2, "blocks 2, 3 are removed: they change")]
)
def test_the_note_names_the_blocks_that_go(
    number: int, words: str, tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thanos.run.allocation.chosen_blocks", lambda *_: {"dropped": [1, 2][-number:]})
    made, events = recipe(text_file, pattern="blocks", sparsity=number / 3), list[Any]()
    thanos.prune(tiny_llama, tmp_path / "out", made, on_event=events.append)
    assert any(f"{words} the outputs least (requested" in one.message for one in events if one.kind == "note")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "wanda"}, "nothing compensates for the removed units: method wanda does not change"),
        ({"method": "magnitude", "pattern": "heads"}, "method magnitude does not change"),
        ({"pattern": "blocks"}, "nothing compensates for the removed blocks; effort high"),
        ({"method": "wanda", "refit": 2}, ""),
        ({"method": "wanda", "effort": "high"}, ""),
        ({"pattern": "blocks", "effort": "high"}, ""),
        ({}, ""),
        ({"method": "sparsegpt"}, ""),
    ],
)
def test_a_run_says_that_nothing_compensates(
    settings: dict[str, Any], words: str, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    multiple = {} if settings.get("pattern") == "blocks" else {"multiple_of": 1}
    made = recipe(text_file, **{"pattern": "neurons", "sparsity": 0.5} | multiple | settings)
    report = thanos.prune(tiny_llama, tmp_path / "out", made)
    found = [line for line in report.warnings if line.startswith("nothing ")]
    assert len(found) == bool(words)
    assert words in "".join(found)
    assert all(line in (tmp_path / "out/README.md").read_text() for line in found)


@pytest.mark.parametrize("architecture", MIXTURES)
@pytest.mark.parametrize("settings", [{"dense_target": 1.0}, {"effort": "high"}, {"effort": "max", "tune": 2}])
def test_the_block_before_makes_up_for_blocks_of_a_mixture(
    settings: dict[str, Any], architecture: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thanos.run.allocation.chosen_blocks", lambda *_: {"dropped": [1, 2]})
    dense = save_tiny(tmp_path / "model", architecture, num_hidden_layers=4)
    given = Calibration(windows(8, LENGTH), str(text_file), "packed", 0, 1)
    made = recipe(text_file, pattern="blocks", sparsity=0.5, samples=8, **settings)
    report = thanos.prune(dense, tmp_path / "out", made, calibration=given)
    assert [layer.name for layer in report.layers] == ["model.layers.0.self_attn.o_proj"]
    *_, last = report.block_errors[-1].errors.values()
    before = report.block_errors[-1].errors["dense"]
    assert last is not None
    assert before is not None
    if settings == {
        "effort": "high"
    }:  # on held-out sequences, and with weights that predict nothing: then nothing changes
        assert last <= before
    else:
        assert last < before
    assert not [line for line in report.warnings if line.startswith("nothing ")]


def test_in_a_mixture_the_attention_is_fitted_to_what_the_experts_leave_missing(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thanos.run.allocation.chosen_blocks", lambda *_: {"dropped": [1, 2]})
    dense = save_tiny(tmp_path / "model", "mixtral", num_hidden_layers=4)
    given = Calibration(windows(8, LENGTH), str(text_file), "packed", 0, 1)
    made = recipe(text_file, pattern="blocks", sparsity=0.5, samples=8, dense_target=1.0, damping=0.02)
    thanos.prune(dense, tmp_path / "out", made, calibration=given)
    hidden = states(dense, given.ids, torch.float32)  # torch's product over experts has no float64
    wanted, output = hidden[3].double(), hidden[1].double()
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    layer, seen = model.model.layers[0].self_attn.o_proj, dict[str, Tensor]()
    layer.register_forward_hook(
        lambda _, args, out: seen.update(x=args[0].flatten(0, 1).double(), y=out.flatten(0, 1).double())
    )
    with torch.inference_mode():
        model(given.ids)
    gram, weight = seen["x"].T @ seen["x"], layer.weight.detach().double()
    ridge = 0.02 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    left = wanted - (output - seen["y"])
    expected = torch.linalg.solve(gram + ridge, seen["x"].T @ left + ridge @ weight.T).T
    got = load_file(tmp_path / "out/model.safetensors")["model.layers.0.self_attn.o_proj.weight"]
    torch.testing.assert_close(got.double(), expected, rtol=2e-3, atol=2e-4)
