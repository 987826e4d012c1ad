"""Pruning with additional sequences that the dense model generates (``generate``)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import thanos
from helpers import save_tiny, stopped_at, tiny_model, tiny_tokenizer
from thanos.calibration.continued import Pieces, generate_sequences
from thanos.calibration.generation import continue_prompts
from thanos.calibration.kept import read_windows, write_windows
from thanos.calibration.windows import Calibration, build_calibration
from thanos.engine.distributed import World
from thanos.errors import DataError, NumericsError, RecipeError, UserError
from thanos.recipe.repair import PROMPT
from thanos.run.work_folder import WorkFolder

SAMPLES, LENGTH, GENERATE = 6, 32, 5


def recipe(text: Path, **changes: Any) -> thanos.Recipe:
    values = {"samples": SAMPLES, "sequence_length": LENGTH, "generate": GENERATE, "calibration": str(text)}
    return thanos.Recipe(**{**values, "device": "cpu", "pattern": "2:4", **changes})


def text_windows(model: Path, text: Path) -> Calibration:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return build_calibration(str(text), tokenizer, samples=SAMPLES, sequence_length=LENGTH, seed=0, end_of_text_id=2)


@pytest.mark.parametrize("pieces", [{}, {"segment": 12, "prompt": 3}], ids=["default", "short"])
def test_the_generated_sequences_come_before_those_of_the_text(
    pieces: dict[str, int], tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    """Two of the six sequences of the text are held out. Only the others are continued."""
    text = text_windows(tiny_llama, text_file)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    new = generate_sequences(model, text.ids[:4], text.bos_ids, GENERATE, 0, 0, lambda event: None, Pieces(**pieces))
    wanted = dataclasses.replace(text, ids=torch.cat([new, text.ids]), generated=GENERATE)
    settings = recipe(text_file, effort="max", held_out=2, tune=1, **pieces)
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
    if pieces:
        return  # three tokens of the text are in other places of it, too
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


@pytest.mark.parametrize("generate", [0, GENERATE])
def test_a_text_that_changed_is_another_run(generate: int, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """The report has the hash of the text. A resumed run does not read the text again if the model generated windows."""
    text, settings = tmp_path / "text.txt", recipe(tmp_path / "text.txt", generate=generate)
    text.write_bytes(text_file.read_bytes())
    with pytest.raises(KeyboardInterrupt):
        thanos.prune(tiny_llama, tmp_path / "out", settings, on_event=stopped_at(1))
    text.write_bytes(b"other words " + text_file.read_bytes())
    with pytest.raises(UserError, match="sha256 of the calibration text"):
        thanos.prune(tiny_llama, tmp_path / "out", settings, resume=True)


def test_the_report_has_the_hash_of_the_text_that_was_read(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    text, was = tmp_path / "text.txt", text_file.read_bytes()
    text.write_bytes(was)

    def change(event: thanos.Event) -> None:
        if event.kind == "block":
            text.write_bytes(b"other words")

    report = thanos.prune(tiny_llama, tmp_path / "out", recipe(text, generate=0), on_event=change)
    assert report.calibration["text_sha256"] == hashlib.sha256(was).hexdigest()


@pytest.mark.parametrize("length", [0, 100])
def test_windows_that_were_cut_short_are_generated_again(
    length: int, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    whole = thanos.prune(tiny_llama, tmp_path / "whole", recipe(text_file))
    with pytest.raises(KeyboardInterrupt):
        thanos.prune(tiny_llama, tmp_path / "out", recipe(text_file), on_event=stopped_at(1))
    kept = WorkFolder(tmp_path / "out").path / "windows.safetensors"
    kept.write_bytes(kept.read_bytes()[:length])
    resumed = thanos.prune(tiny_llama, tmp_path / "out", recipe(text_file), resume=True)
    assert resumed.calibration == whole.calibration


@pytest.mark.parametrize("plans", [True, False])
def test_a_tokenizer_of_another_model_is_named_before_the_model_generates(
    plans: bool, text_file: Path, tmp_path: Path
) -> None:
    model = save_tiny(tmp_path / "model", vocab_size=100)
    with pytest.raises(DataError, match="the model embeds only 100; the tokenizer belongs to another"):
        (thanos.plan if plans else thanos.prune)(model, tmp_path / "out", recipe(text_file))


@pytest.mark.parametrize("source", ["text", "self"])
def test_a_model_that_can_sample_no_token_is_refused(source: str, text_file: Path, tmp_path: Path) -> None:
    """All its weights are finite, but its logits are not."""
    model = tiny_model(dtype=torch.float16)
    model.lm_head.weight.data.fill_(60000.0)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    settings = recipe(text_file) if source == "text" else recipe(Path("self"), generate=0)
    with pytest.raises(NumericsError, match="the model gives NaN or infinite logits, so that it cannot generate text"):
        thanos.prune(tmp_path / "model", tmp_path / "out", settings)
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_logits_that_become_nan_while_the_model_generates_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thanos.calibration.generation._check_outputs", lambda model, prompt: None)
    model = tiny_model()
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(NumericsError, match="NaN or infinite logits"):
        continue_prompts(model, torch.ones(2, 1, dtype=torch.int64), 4, 0, 2, "calibration", lambda event: None)


def test_a_damaged_weight_is_named_in_the_plan(text_file: Path, tmp_path: Path) -> None:
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(NumericsError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        thanos.plan(tmp_path / "model", tmp_path / "out", recipe(text_file))


@pytest.mark.parametrize("source", ["text", "self"])
def test_the_processes_synchronise_after_each_part_that_is_generated(
    source: str, tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else those that wait for the windows run into the timeout of torch.distributed."""
    monkeypatch.setattr("thanos.calibration.continued.PIECES", {"cpu": 2})
    monkeypatch.setattr("thanos.calibration.windows.generate", _in_threes)
    shared = list[Any]()

    def from_first(self: World, make: Any) -> Any:
        shared.append(make())
        return shared[-1]

    monkeypatch.setattr(World, "from_first", from_first)
    settings = recipe(text_file) if source == "text" else recipe(Path("self"), generate=0)
    parts = list[Any]()
    thanos.prune(
        tiny_llama,
        tmp_path / "out",
        settings,
        on_event=lambda event: (
            parts.append(event) if event.kind == "progress" and event.phase == "calibration" else None
        ),
    )
    first = next(number for number, made in enumerate(shared) if isinstance(made, Calibration))
    assert len(parts) >= 2
    assert shared[:first] == [None] * (1 + len(parts))  # the first None: no run was published


def _in_threes(model: Any, samples: int, length: int, seed: int, start: Any, emit: Any) -> Any:
    prompts = torch.tensor(start).expand(samples, -1)
    return continue_prompts(model, prompts, length, seed, 3, "calibration", emit)


def test_a_seed_of_any_size_is_taken(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """The windows, the generated sequences, and the tuning, whose seeds are multiples of the run's."""
    for number, seed in enumerate((2**50, 10**20)):
        report = thanos.prune(tiny_llama, tmp_path / f"out{number}", recipe(text_file, seed=seed, tune=1))
        assert report.calibration["seed"] == seed
        thanos.plan(tiny_llama, tmp_path / "plan", recipe(text_file, seed=seed))
    with pytest.raises(KeyboardInterrupt):  # the model has generated text
        thanos.prune(
            tiny_llama, tmp_path / "self", recipe(Path("self"), generate=0, seed=10**20), on_event=stopped_at(0)
        )


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


@pytest.mark.parametrize(("effort", "pieces"), [("fast", {}), ("max", {"segment": 9, "prompt": 0})])
def test_the_plan_counts_the_generated_sequences(
    effort: str, pieces: dict[str, int], tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    few, more = (
        thanos.plan(tiny_llama, tmp_path / "out", recipe(text_file, effort=effort, **changes))
        for changes in ({"generate": 0}, {"generate": 30, **pieces})
    )
    assert more.activations_bytes * SAMPLES == few.activations_bytes * (SAMPLES + 30)
    assert more.phases["calibration"].seconds > 0
    assert json.loads(json.dumps(more.recipe))["generate"] == 30
