"""Stages: what they get, that they may train, and that what they do is recorded, journalled and resumed to the byte."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import thanos
from helpers import packed_windows, save_tiny, tiny_tokenizer
from reports import contents
from thanos.engine.stages.base import BlockContext, BlockStage
from thanos.engine.stages.prune import PruneStage

SAMPLES, LENGTH, BLOCKS = 4, 32, 4
RATE = 0.5


def recipe(text: Path, **changes: Any) -> thanos.Recipe:
    settings = {"calibration": str(text), "samples": SAMPLES, "sequence_length": LENGTH, "device": "cpu"}
    return thanos.Recipe(**settings | changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("stages") / "model", num_hidden_layers=BLOCKS, dtype=torch.bfloat16)


def use(monkeypatch: pytest.MonkeyPatch, *stages: BlockStage) -> None:
    monkeypatch.setattr("thanos.run.engine_setup.stages_of", lambda recipe: stages)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


# --- training -------------------------------------------------------------------------------------------------------------


@dataclass
class OneStep:
    """One step of gradient descent on the weights that stay, towards outputs of zero."""

    name: str = "one-step"
    losses: list[float] = field(default_factory=list)

    def __call__(self, context: BlockContext) -> Iterator[thanos.Event]:
        kept = {layer: context.kept(layer) for layer in context.layers}
        trained = {layer: context.weights.parameter(layer.weight_name).requires_grad_() for layer in kept}
        with torch.enable_grad():
            for first, hidden in context.batches(SAMPLES):
                loss = context.forward(hidden, first).float().square().mean()
                loss.backward()
                self.losses.append(loss.item())
        for layer, mask in kept.items():
            weight = trained[layer]
            assert weight.grad is not None
            context.put(layer.weight_name, weight.detach() - RATE * weight.grad * mask)
            yield context.event("layer", "solve", layer=layer.name)


def test_a_stage_may_train_the_weights_that_stay(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / "model", num_hidden_layers=2)
    settings = recipe(text_file, dtype="float32")
    thanos.prune(folder, tmp_path / "pruned", settings)
    stage = OneStep()
    use(monkeypatch, PruneStage(), stage)
    with torch.inference_mode():  # whatever the caller's mode
        thanos.prune(folder, tmp_path / "trained", settings)
    assert len(stage.losses) == 2
    # The first block's inputs are the same in both runs, so that plain autograd gives what the step must have been.
    ids = packed_windows(tiny_tokenizer(), text_file.read_text(), SAMPLES, LENGTH)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    outputs: list[Tensor] = []
    plain.model.layers[0].register_forward_hook(lambda _, args, out: outputs.append(out))
    plain(input_ids=ids)
    loss = outputs[0].square().mean()
    loss.backward()
    assert stage.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    pruned, trained = weights(tmp_path / "pruned"), weights(tmp_path / "trained")
    for name, parameter in plain.model.layers[0].named_parameters():
        key = f"model.layers.0.{name}"
        if not name.endswith("proj.weight"):
            assert torch.equal(trained[key], pruned[key])
            continue
        expected = pruned[key] - RATE * parameter.grad * (pruned[key] != 0)
        torch.testing.assert_close(trained[key], expected, rtol=1e-4, atol=1e-6)
        assert not torch.equal(trained[key], pruned[key])
        assert torch.equal(trained[key] == 0, pruned[key] == 0)


# --- what a stage gets, and what becomes of what it does ----------------------------------------------------------------------


@dataclass
class Scale:
    """Changes the weights that stay, a norm's gains, and one weight to zero."""

    name: str = "scale"
    seen: list[int | None] = field(default_factory=list)

    def __call__(self, context: BlockContext) -> Iterator[thanos.Event]:
        self.seen.append(context.index)
        yield context.note(f"block {context.index} is scaled", "solve")
        for layer in context.layers:
            weight = context.weights.parameter(layer.weight_name) * 1.25
            if layer.name.endswith("o_proj"):
                row, column = context.kept(layer).nonzero()[0].tolist()
                weight[row, column] = 0
            context.put(layer.weight_name, weight)
        if context.index is not None:
            norm = f"model.layers.{context.index}.input_layernorm.weight"
            context.put(norm, context.dense(norm).float() * 1.5)


class Stop(Exception):  # noqa: N818  it is a signal, not an error
    """Ends a run in a test."""


def stop_in(block: int, kind: str) -> Callable[[thanos.Event], None]:
    def watch(event: thanos.Event) -> None:
        if event.block == block and event.kind == kind:
            raise Stop

    return watch


TARGETS = ("layers.*", "lm_head")


def test_a_later_stage_is_recorded_and_its_weights_are_those_that_go_on(
    model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thanos.prune(model, tmp_path / "pruned", recipe(text_file, targets=TARGETS))
    stage = Scale()
    use(monkeypatch, PruneStage(), stage)
    report = thanos.prune(model, tmp_path / "out", recipe(text_file, targets=TARGETS))
    assert stage.seen == [*range(BLOCKS), None]
    assert report.warnings == [f"block {index} is scaled" for index in stage.seen]
    pruned, written = weights(tmp_path / "pruned"), weights(tmp_path / "out")
    for layer in report.layers:
        weight = written[f"{layer.name}.weight"]
        assert layer.changed_by == ["scale"]
        assert layer.zeros == int((weight == 0).sum())
        assert layer.sparsity == layer.zeros / weight.numel()
        if layer.block == 0:  # whose inputs are those of the run without the stage
            before = pruned[f"{layer.name}.weight"]
            lost = layer.name.endswith("o_proj")
            assert int((weight == 0).sum()) == int((before == 0).sum()) + lost
            stays = weight != 0
            assert torch.equal(weight[stays], (before * 1.25)[stays])
    dense = weights(model)
    for index in range(BLOCKS):
        gains = f"model.layers.{index}.input_layernorm.weight"
        assert torch.equal(written[gains], (dense[gains].float() * 1.5).to(torch.bfloat16))
    assert report.totals["zeros_targeted"] == sum(layer.zeros for layer in report.layers)
    name = "model.layers.1.self_attn.q_proj.weight"  # pruned on what the scaled block gives
    assert not torch.equal(written[name], (pruned[name] * 1.25))


@pytest.mark.parametrize(("block", "kind"), [(1, "layer"), (2, "note"), (2, "block"), (3, "progress")])
def test_a_run_with_a_later_stage_resumes_to_the_same_bytes(
    block: int, kind: str, model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, PruneStage(), Scale())
    settings = recipe(text_file, targets=TARGETS)
    thanos.prune(model, tmp_path / "whole", settings)
    with pytest.raises(Stop):
        thanos.prune(model, tmp_path / "out", settings, on_event=stop_in(block, kind))
    lines = (tmp_path / ".out.partial/journal.jsonl").read_text().splitlines()
    for index, line in enumerate(map(json.loads, lines)):
        assert f"model.layers.{index}.input_layernorm.weight" in line["tensors"]
        assert len(line["tensors"]) == 8
        assert all(layer["changed_by"] == ["scale"] for layer in line["layers"])
    stage = Scale()
    use(monkeypatch, PruneStage(), stage)
    thanos.prune(model, tmp_path / "out", settings, resume=True)
    assert stage.seen == [*range(len(lines), BLOCKS), None]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_globs_of_a_recipe_are_applied_once(
    model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    original = thanos.Recipe.for_layer

    def for_layer(self: thanos.Recipe, name: str) -> Any:
        asked.append(name)
        return original(self, name)

    monkeypatch.setattr(thanos.Recipe, "for_layer", for_layer)
    report = thanos.prune(model, tmp_path / "out", recipe(text_file))
    assert sorted(asked) == sorted(layer.name for layer in report.layers)
