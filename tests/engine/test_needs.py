"""What is gathered follows from what methods need; it never changes a weight, and the record says what the errors are of."""

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
from helpers import packed_windows, save_tiny, tiny_tokenizer
from thanos.calibration import accumulators
from thanos.engine import block_runner
from thanos.engine.block_calls import BlockCalls
from thanos.engine.stages import prune as stage

SAMPLES, LENGTH, SAMPLED = 8, 32, 3
TOKENS = SAMPLES * LENGTH


@pytest.fixture(autouse=True)
def one_sequence_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(block_runner.BATCH_TOKENS, "cpu", LENGTH)
    monkeypatch.setattr(stage, "ERROR_SEQUENCES", SAMPLED)
    monkeypatch.setattr(accumulators.SquaredNorms, "suits", staticmethod(lambda *_: True))


def recipe(text: Path, **changes: Any) -> thanos.Recipe:
    settings = {"calibration": str(text), "samples": SAMPLES, "sequence_length": LENGTH, "device": "cpu"}
    return thanos.Recipe(**settings | changes)


def same(a: Path, b: Path) -> bool:
    return (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


@pytest.mark.parametrize("targets", [(), ("layers.*", "lm_head")])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_errors_are_measured_on_what_is_said_and_change_no_weight(
    method: str, targets: tuple[str, ...], tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    reports = {}
    for measure in (None, True, False):
        settings = recipe(text_file, method=method, measure_error=measure, targets=targets)
        reports[measure] = thanos.prune(tiny_llama, tmp_path / str(measure), settings).layers
        assert same(tmp_path / str(measure), tmp_path / "None")
    needs_gram = method == "sparsegpt"
    for some, whole, none in zip(*(reports[measure] for measure in (None, True, False)), strict=True):
        assert (whole.tokens, whole.error_tokens) == (TOKENS, TOKENS)
        assert some.error_tokens == (TOKENS if needs_gram else SAMPLED * LENGTH)
        assert some.tokens == (SAMPLED * LENGTH if method == "magnitude" else TOKENS)
        assert some.error_after_compensation == pytest.approx(whole.error_after_compensation, rel=0.5)
        assert (none.error_after_compensation == whole.error_after_compensation) is needs_gram
        if not needs_gram:
            assert (none.error_after_compensation, none.error_before_compensation) == (None, None)
            assert (none.error_tokens, none.tokens) == (None, 0 if method == "magnitude" else TOKENS)
        assert some.warnings == whole.warnings == none.warnings == []


def test_an_error_of_a_sample_is_that_of_its_tokens(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    report = thanos.prune(tiny_llama, tmp_path / "out", recipe(text_file, method="wanda", sparsity=0.6))
    name = "model.layers.0.mlp.down_proj"
    ids = packed_windows(tiny_tokenizer(), text_file.read_text(), SAMPLED, LENGTH)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    rows: list[Tensor] = []
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: rows.append(args[0].double()))
    with torch.no_grad():
        model(input_ids=ids)
    x = rows[0].reshape(-1, rows[0].shape[-1])
    dense, pruned = (
        load_file(folder / "model.safetensors")[f"{name}.weight"].double() for folder in (tiny_llama, tmp_path / "out")
    )
    layer = next(layer for layer in report.layers if layer.name == name)
    error = ((pruned - dense) @ x.T).square().sum() / (dense @ x.T).square().sum()
    assert layer.error_after_compensation == pytest.approx(error.item(), rel=1e-4)
    assert layer.error_before_compensation == layer.error_after_compensation


def test_magnitude_runs_the_sample_alone_and_nothing_without_it(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, grams = [], []
    run, add = BlockCalls.run, accumulators.add_gram

    def counted(self: BlockCalls, index: int, hidden: Tensor, first: int, **how: bool) -> Tensor:
        passes.append(index)
        return run(self, index, hidden, first, **how)

    def multiplied(hessian: Tensor, rows: Tensor) -> None:
        grams.append(len(rows))
        add(hessian, rows)

    monkeypatch.setattr(BlockCalls, "run", counted)
    monkeypatch.setattr(accumulators, "add_gram", multiplied)
    events: list[thanos.Event] = []
    for measure, observed in ((None, SAMPLED), (True, SAMPLES), (False, 0)):
        passes.clear()
        grams.clear()
        events.clear()
        settings = recipe(text_file, method="magnitude", measure_error=measure)
        thanos.prune(tiny_llama, tmp_path / str(measure), settings, on_event=events.append)
        assert passes.count(0) == observed + SAMPLES  # and the pass that makes the next block's inputs
        assert len(grams) == 3 * 4 * observed  # 3 blocks of 4 distinct inputs
        done = [(e.done, e.total) for e in events if e.kind == "progress" and e.phase == "statistics" and e.block == 0]
        assert done == [(number, observed) for number in range(1, observed + 1)]


def test_where_norms_do_not_suit_the_gram_is_gathered(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accumulators.SquaredNorms, "suits", staticmethod(lambda *_: False))
    for layer in thanos.prune(tiny_llama, tmp_path / "out", recipe(text_file, method="wanda")).layers:
        assert (layer.tokens, layer.error_tokens) == (TOKENS, TOKENS)


def test_outlier_rows_need_all_tokens(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    settings = recipe(text_file, method="magnitude", outlier_rows=0.1, measure_error=False)
    for layer in thanos.prune(tiny_llama, tmp_path / "out", settings).layers:
        assert (layer.tokens, layer.error_tokens) == (TOKENS, TOKENS)


def test_a_method_that_needs_no_inputs_is_not_warned_about_them(text_file: Path, tmp_path: Path) -> None:
    mixture = save_tiny(tmp_path / "model", "olmoe")
    for method, warned in (("magnitude", False), ("wanda", True)):
        report = thanos.prune(
            mixture, tmp_path / method, recipe(text_file, method=method, samples=3, sequence_length=8)
        )
        assert any("experts received" in line for line in report.warnings) is warned
        assert any(layer.warnings for layer in report.layers) is warned


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_a_refit_gathers_the_gram_and_reports_what_it_did(
    method: str, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    plain = thanos.prune(tiny_llama, tmp_path / "plain", recipe(text_file, method=method))
    report = thanos.prune(tiny_llama, tmp_path / "out", recipe(text_file, method=method, refit=10))
    for layer, before in zip(report.layers, plain.layers, strict=True):
        assert layer.error_tokens == layer.tokens == TOKENS
        assert layer.zeros == before.zeros
        assert layer.errors is not None
        assert list(layer.errors) == ["removed", method, "refit"]
        assert layer.errors["refit"] == layer.error_after_compensation < layer.errors[method]
        assert layer.residual is not None
        assert layer.damping == 0.01
        assert (before.errors, before.residual, before.damping) == (None, None, None)
    written = json.loads((tmp_path / "plain" / "pruning.json").read_text(encoding="utf-8"))
    assert not {"errors", "residual", "target_change"} & set(written["layers"][0])
    assert thanos.PruningReport.read(tmp_path / "out" / "pruning.json") == report
