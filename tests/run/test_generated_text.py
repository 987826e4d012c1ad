"""Pruning with additional sequences that the dense model generates (``generate``)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import thanos
from thanos.calibration.continued import PROMPT, generate_sequences
from thanos.calibration.kept import read_windows, write_windows
from thanos.calibration.windows import Calibration, build_calibration
from thanos.errors import RecipeError, UserError
from thanos.run.work_folder import WorkFolder

SAMPLES, LENGTH, GENERATE = 6, 32, 5


def recipe(text: Path, **changes: Any) -> thanos.Recipe:
    values = {"samples": SAMPLES, "sequence_length": LENGTH, "generate": GENERATE, "calibration": str(text)}
    return thanos.Recipe(**{**values, "device": "cpu", "pattern": "2:4", **changes})


def text_windows(model: Path, text: Path) -> Calibration:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return build_calibration(str(text), tokenizer, samples=SAMPLES, sequence_length=LENGTH, seed=0, end_of_text_id=2)


def stopped_at(block: int) -> Any:
    def stop(event: thanos.Event) -> None:
        if event.kind == "block" and event.block == block:
            raise KeyboardInterrupt

    return stop


def test_the_generated_sequences_come_before_those_of_the_text(
    tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    """Two of the six sequences of the text are held out. Only the others are continued."""
    text = text_windows(tiny_llama, text_file)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    new = generate_sequences(model, text.ids[:4], text.bos_ids, GENERATE, 0, 0, lambda event: None)
    wanted = dataclasses.replace(text, ids=torch.cat([new, text.ids]), generated=GENERATE)
    settings = recipe(text_file, effort="max", held_out=2, tune=1)
    report = thanos.prune(tiny_llama, tmp_path / "out", settings)
    assert report.calibration["sha256"] == wanted.sha256
    assert {key: report.calibration[key] for key in ("samples", "generated", "tokens")} == {
        "samples": SAMPLES,
        "generated": GENERATE,
        "tokens": (SAMPLES + GENERATE) * LENGTH,
    }
    assert [record.held_out_sequences for record in report.tuning] == [2] * len(report.tuning)
    assert [record.sequences for record in report.tuning] == [SAMPLES + GENERATE - 2] * len(report.tuning)
    thanos.prune(tiny_llama, tmp_path / "given", settings, calibration=wanted)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "given"))
    assert first == second
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{SAMPLES} × {LENGTH} tokens, packed, {GENERATE} more in which the dense model continues pieces" in card
    held, prompt = text.ids[4:, len(text.bos_ids) :].unfold(1, min(PROMPT, LENGTH // 2), 1).flatten(0, 1).tolist(), 8
    begun = new[:, len(text.bos_ids) :][:, : len(held[0])].tolist()
    assert not any(row[:prompt] == piece[:prompt] for row in begun for piece in held)


def test_without_generated_sequences_nothing_changes(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    report = thanos.prune(tiny_llama, tmp_path / "out", recipe(text_file, generate=0))
    assert report.calibration["sha256"] == text_windows(tiny_llama, text_file).sha256
    assert "generated" not in report.calibration
    assert "generate" not in report.recipe


@pytest.mark.parametrize("source", ["text", "self"])
def test_an_interrupted_run_does_not_generate_again(
    source: str, tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe(text_file) if source == "text" else recipe(Path("self"), generate=0)
    whole = thanos.prune(tiny_llama, tmp_path / "whole", settings)
    with pytest.raises(KeyboardInterrupt):
        thanos.prune(tiny_llama, tmp_path / "out", settings, on_event=stopped_at(1))

    def fail(*arguments: Any, **more: Any) -> None:
        raise AssertionError("the model generates again")

    monkeypatch.setattr("transformers.GenerationMixin.generate", fail)
    resumed = thanos.prune(tiny_llama, tmp_path / "out", settings, resume=True)
    assert resumed.calibration == whole.calibration
    assert not (tmp_path / "out" / "windows.safetensors").exists()
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole"))
    assert first == second


def test_another_number_of_generated_sequences_is_another_run(
    tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        thanos.prune(tiny_llama, tmp_path / "out", recipe(text_file), on_event=stopped_at(1))
    assert WorkFolder(tmp_path / "out").windows(recipe(text_file)) is not None
    with pytest.raises(UserError, match="generate"):
        thanos.prune(tiny_llama, tmp_path / "out", recipe(text_file, generate=4), resume=True)


def test_kept_windows_are_read_as_they_were_written(tmp_path: Path) -> None:
    ids = torch.arange(24).view(4, 6)
    made = Calibration(ids, "text", "packed", 3, 2, bos_ids=(1, 7), generated=3)
    write_windows(tmp_path / "windows", made)
    again = read_windows(tmp_path / "windows", "text")
    assert again is not None
    assert torch.equal(again.ids, ids)
    assert (
        dataclasses.replace(again, ids=ids) == dataclasses.replace(made, ids=ids) or again.to_dict() == made.to_dict()
    )
    assert (again.samples, again.generated) == (1, 3)


def test_text_of_the_model_alone_is_not_continued() -> None:
    with pytest.raises(RecipeError, match=r"generate is 5\); raise samples instead"):
        recipe(Path("self"))


@pytest.mark.parametrize("effort", ["fast", "max"])
def test_the_plan_counts_the_generated_sequences(
    effort: str, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    few, more = (
        thanos.plan(tiny_llama, tmp_path / "out", recipe(text_file, effort=effort, generate=count)) for count in (0, 30)
    )
    assert more.activations_bytes * SAMPLES == few.activations_bytes * (SAMPLES + 30)
    assert more.phases["calibration"].seconds > 0
    assert json.loads(json.dumps(more.recipe))["generate"] == 30
