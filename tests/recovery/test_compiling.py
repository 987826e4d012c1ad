"""A recovery through ``torch.compile``: the same training up to rounding, and where it is used."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import thanos
from helpers import save_tiny, tiny_model
from recovering import prune, read, settings
from thanos.model.experts import unfuse
from thanos.recovery import compiling
from thanos.recovery.distance import Distillation, divergence

pytest.importorskip("accelerate", reason="the extra recover is not installed")

CUDA = torch.device("cuda")


def module(**changes: Any) -> Distillation:
    return Distillation(tiny_model("llama", seed=1, **changes), tiny_model("llama", seed=0))


def wanted(text: Path, module: Distillation, device: torch.device = CUDA, **changes: Any) -> bool:
    recipe = settings(text, **{"epochs": 100} | changes)
    return compiling._wanted(recipe, device, module)


@pytest.mark.slow
def test_compiled_code_gives_the_same_training_up_to_rounding(
    pruned: Path,
    tiny_llama: Path,
    text_file: Path,
    recovered: tuple[Path, thanos.RecoveryReport],
    tmp_path: Path,
) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    recipe = dataclasses.replace(settings(text_file), compile=True)
    report = thanos.recover(pruned, tmp_path / "out", dense=tiny_llama, recipe=recipe)
    assert counters["frames"]["ok"] >= 3  # the student's blocks, the teacher's, and the divergence
    assert not report.warnings
    plain_folder, plain = recovered
    for entry, other in zip(report.history, plain.history, strict=True):
        assert entry["held_out"] == pytest.approx(other["held_out"], rel=1e-4)
    expected = read(plain_folder)
    for name, tensor in read(tmp_path / "out").items():
        assert ((tensor == 0) == (expected[name] == 0)).all(), name
        # The rate is 1e-3 and there are six steps, so a wrong gradient would differ by far more.
        torch.testing.assert_close(tensor.float(), expected[name].float(), rtol=1e-2, atol=2e-4)


def test_the_blocks_run_as_before_afterwards() -> None:
    models = module()
    block = models.student.get_submodule("model.layers.0")
    assert block._compiled_call_impl is None
    assert models._divergence is divergence
    with compiling.compiled(models, lambda _: None):
        assert block._compiled_call_impl is not None
        assert models._divergence is not divergence
    assert block._compiled_call_impl is None
    assert models._divergence is divergence


def test_it_is_used_where_it_saves_time(text_file: Path) -> None:
    assert wanted(text_file, module())
    assert not wanted(text_file, module(), torch.device("cpu"))
    assert not wanted(text_file, module(), epochs=3)
    assert not wanted(text_file, module(), shard=True)
    experts = [tiny_model("mixtral", seed=seed) for seed in (1, 0)]
    for model in experts:
        unfuse(model)  # as a recovery opens them
    assert not wanted(text_file, Distillation(*experts))
    assert not wanted(text_file, module(), compile=False)
    assert wanted(text_file, module(), torch.device("cpu"), compile=True)


def test_blocks_of_many_kinds_are_not_compiled(text_file: Path) -> None:
    many = module(num_hidden_layers=6)
    for number, block in enumerate(many.student.model.layers):
        block.mlp.up_proj = torch.nn.Linear(8, 8 + number)
    assert not wanted(text_file, many)


def test_without_a_compiler_the_training_runs_and_says_so(
    pruned: Path, tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no C++ compiler was found\nand more")

    monkeypatch.setattr(torch, "compile", fails)
    events: list[thanos.Event] = []
    recipe = dataclasses.replace(settings(text_file), compile=True)
    report = thanos.recover(pruned, tmp_path / "out", dense=tiny_llama, recipe=recipe, on_event=events.append)
    line = (
        "torch.compile does not work here, so the training runs without it, which is slower: no C++ compiler was found"
    )
    assert line in report.warnings
    assert [event.message for event in events if event.kind == "note"].count(line) == 1
    assert report.held_out_after < report.held_out_before


def test_a_block_that_cannot_be_compiled_is_one_note(
    pruned: Path,
    tiny_llama: Path,
    text_file: Path,
    recovered: tuple[Path, thanos.RecoveryReport],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    small, compile_ = 8, torch.compile

    def backend(graph: Any, inputs: Any) -> Any:
        del inputs
        if len(graph.graph.nodes) > small:
            raise RuntimeError("the graph is too large\nand more")
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(compile_, backend=backend))
    torch._dynamo.reset()  # without the code of other tests
    notes: list[str] = []

    def watch(event: thanos.Event) -> None:
        if event.kind == "note":
            notes.append(event.message)

    recipe = dataclasses.replace(settings(text_file), compile=True)
    report = thanos.recover(pruned, tmp_path / "out", dense=tiny_llama, recipe=recipe, on_event=watch)
    start = "torch.compile failed for a part of the models, which runs without it, which is slower: "
    lines = [line for line in report.warnings if line.startswith(start)]
    assert len(lines) == 1
    assert "the graph is too large" in lines[0]
    assert "\n" not in lines[0]
    assert notes.count(lines[0]) == 1
    assert not [record for record in caplog.records if record.name.startswith("torch._dynamo")]
    assert report.held_out_after == pytest.approx(recovered[1].held_out_after, rel=1e-4)


@pytest.mark.parametrize("value", ["no", 1, 0.5])
def test_compile_is_true_false_or_left_out(value: Any, text_file: Path) -> None:
    with pytest.raises(thanos.errors.RecipeError, match=f"compile must be true, false or left out; got {value!r}"):
        settings(text_file, compile=value)


def test_compile_and_shard_are_refused(text_file: Path) -> None:
    with pytest.raises(thanos.errors.RecipeError, match="compile does not work with shard"):
        compiling.check_compile(settings(text_file, compile=True, shard=True))


def test_a_mixture_of_experts_is_not_compiled_on_request_either(text_file: Path) -> None:
    mixture, plain = tiny_model("mixtral"), tiny_model("llama")
    unfuse(mixture)
    for models in ((mixture, plain), (plain, mixture)):
        with pytest.raises(thanos.errors.RecipeError, match="compile does not work for a mixture of experts"):
            compiling.check_compiles(settings(text_file, compile=True), *models)
        compiling.check_compiles(settings(text_file), *models)
    compiling.check_compiles(settings(text_file, compile=True), plain)


def test_a_mixture_is_refused_before_anything_is_written(text_file: Path, tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "dense", "mixtral")
    pruned = prune(dense, tmp_path / "pruned", text_file)
    with pytest.raises(thanos.errors.RecipeError, match="mixture of experts"):
        thanos.recover(pruned, tmp_path / "out", dense=dense, recipe=settings(text_file, compile=True))
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "pruned"}


def test_compile_is_true_false_or_none(text_file: Path) -> None:
    with pytest.raises(thanos.errors.RecipeError, match="compile must be true, false or left out; got 'no'"):
        settings(text_file, compile="no")


def test_trying_the_compiler_is_a_phase_of_its_own(
    pruned: Path, tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "fault", lambda device: "not here")
    events: list[thanos.Event] = []
    recipe = settings(text_file, compile=True)
    report = thanos.recover(pruned, tmp_path / "out", dense=tiny_llama, recipe=recipe, on_event=events.append)
    phases = [event.phase for event in events if event.kind == "phase"]
    assert phases.index("calibration") < phases.index("compile") < phases.index("train")
    assert "compile" in report.phases
