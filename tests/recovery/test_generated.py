"""Sequences that the dense model generates for the training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

import thanos
from recovering import VARIED, prune, read, settings
from thanos.calibration import continued
from thanos.calibration.continued import Pieces, generate_sequences
from thanos.calibration.generation import Part
from thanos.calibration.making import make_calibration
from thanos.cli.interrupts import EndedEarly, resumable
from thanos.engine.distributed import World
from thanos.errors import RecipeError, UserError
from thanos.model.loading import end_of_text_id
from thanos.model.source import resolve_model
from thanos.recipe.repair import PROMPT, SEGMENT
from thanos.recovery.generated import kept_sequences
from thanos.recovery.states import RecoveryFolder
from thanos.run.recovery_card import held_out_by_kind, recovery_sentence


@pytest.mark.parametrize("bos", [(), (1,), (1, 3)])
def test_pieces_of_the_text_are_continued_by_the_model(bos: tuple[int, ...], tiny_llama: Path) -> None:
    """With logits so far apart that sampling has no choice, the continuation is the greedy one, token by token."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    end = model.generation_config.eos_token_id
    begin = list(bos)
    text = torch.randint(3, model.config.vocab_size, (3, 40), generator=torch.Generator().manual_seed(0))
    text[:, : len(bos)] = torch.tensor(bos)
    places = {tuple(row[i : i + 16]) for row in text[:, len(begin) :].tolist() for i in range(len(row))}
    made = generate_sequences(model, text, bos, 5, 0, 0, lambda event: None)
    assert made.shape == (5, 40)
    assert made.dtype == torch.int64
    for row in made.tolist():
        assert row[: len(begin)] == begin
        tokens = row[len(begin) :]
        half = min(PROMPT, len(tokens) // 2)
        assert any(place[:16] == tuple(tokens[:16]) for place in places)
        ids = torch.tensor([begin + tokens[:half]])
        for token in tokens[half:]:
            logits = model(input_ids=ids).logits[0, -1]
            if end is not None:
                logits[end] = -torch.inf
            assert int(logits.argmax()) == token
            ids = torch.cat([ids, torch.tensor([[token]])], 1)


@pytest.mark.parametrize("segment", [100, SEGMENT, 300])
def test_long_sequences_are_made_of_pieces(segment: int, tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    text = torch.randint(3, model.config.vocab_size, (2, SEGMENT + 70), generator=torch.Generator().manual_seed(0))
    events: list[thanos.Event] = []
    made = generate_sequences(model, text, (), 3, 7, 0, events.append, Pieces(segment))
    stream, rows = made.flatten().tolist(), [row.tolist() for row in text]
    for first in range(0, len(stream) - PROMPT, segment):
        prompt = stream[first : first + PROMPT]
        assert any(prompt == row[i : i + PROMPT] for row in rows for i in range(len(row)))
    pieces = -(-len(stream) // segment)
    assert [(event.phase, event.done, event.total) for event in events] == [("generate", pieces, pieces)]
    again, other = (
        generate_sequences(model, text, (), 3, seed, 0, lambda event: None, Pieces(segment)) for seed in (7, 8)
    )
    assert torch.equal(again, made)
    assert not torch.equal(other, made)


@pytest.mark.parametrize(("prompt", "taken"), [(0, 0), (1, 1), (5, 5), (40, 20)])
@pytest.mark.parametrize("bos", [(), (1,)])
def test_a_piece_begins_with_so_many_tokens_of_the_text(
    prompt: int, taken: int, bos: tuple[int, ...], tiny_llama: Path
) -> None:
    """At most half a piece. Without any, it begins with BOS, or with the end-of-text token, which the text does not contain."""
    model, end = AutoModelForCausalLM.from_pretrained(tiny_llama), 299
    text = torch.full((2, len(bos) + 80), 7)
    text[:, : len(bos)] = 1
    made = generate_sequences(model, text, bos, 3, 0, end, lambda event: None, Pieces(40, prompt))
    assert made.shape == (3, text.shape[1])
    assert (made[:, : len(bos)] == 1).all()
    pieces = made[:, len(bos) :].reshape(6, 40)
    assert (pieces[:, :taken] == 7).all()
    assert not (pieces[:, taken] == 7).all()
    if not prompt:
        assert bool((pieces[:, 0] == end).all()) == (not bos)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_beams": 3},
        {"num_return_sequences": 2},
        {"min_p": 0.9},
        {"typical_p": 0.2},
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(3, 300))},
        {"forced_eos_token_id": 2},
        {"cache_implementation": "static"},
        {"return_dict_in_generate": True},
        {"stop_strings": ["a"]},
        {"max_time": 1e-9},
        {"max_length": 3, "min_length": 39},
        {"pad_token_id": None},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_the_generation_config_does_not_change_the_samples(changes: dict[str, object], tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    text = torch.randint(3, model.config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    made = generate_sequences(model, text, (), 3, 7, 0, lambda event: None)
    config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    for name, value in changes.items():
        setattr(config, name, value)
    model.generation_config = config
    assert torch.equal(generate_sequences(model, text, (), 3, 7, 0, lambda event: None), made)
    assert model.generation_config is config


@pytest.mark.parametrize("bos", [(), (1,)])
def test_sequences_of_two_tokens(bos: tuple[int, ...], tiny_llama: Path) -> None:
    """One token is given, the text's or BOS, and one is generated: also with BOS as the only prompt."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    text = torch.tensor([[1, 7], [1, 9]])
    made = generate_sequences(model, text, bos, 50, 0, 0, lambda event: None)
    assert made.shape == (50, 2)
    assert set(made[:, 0].tolist()) <= ({1, 7, 9} if not bos else {1})
    assert len(made[:, 1].unique()) > 10


@pytest.mark.parametrize("changes", [{}, VARIED], ids=["same", "varied"])
def test_an_interrupted_recovery_goes_on_with_the_same_sequences(
    changes: dict[str, object], tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    pruned = prune(tiny_llama, tmp_path / "out", text_file)
    recipe = settings(text_file, generate=8, **changes)

    def stop(event: thanos.Event) -> None:
        if event.phase == "train" and event.kind == "progress" and event.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        thanos.recover(pruned, tmp_path / "out2", dense=tiny_llama, recipe=recipe, on_event=stop)
    phases: set[str] = set()
    report = thanos.recover(
        pruned, tmp_path / "out2", dense=tiny_llama, recipe=recipe, resume=True, on_event=lambda e: phases.add(e.phase)
    )
    assert "generate" not in phases
    whole = thanos.recover(pruned, tmp_path / "whole", dense=tiny_llama, recipe=recipe)
    assert report.sequences == {"trained": 16, "held_out": 3}
    assert report.steps == whole.steps == 3 * 4
    assert report.history == whole.history
    first, second = read(tmp_path / "out2"), read(tmp_path / "whole")
    assert all(torch.equal(first[name], second[name]) for name in second)
    assert not list((tmp_path / "out2").glob("generated*"))


def test_of_the_generated_sequences_too_some_are_held_out(
    pruned: Path, tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The divergence before the training is that of the last two of the text and the last two generated sequences."""
    from thanos.recovery import trainer

    trained: list[Any] = []

    class Recorded(trainer.Sequences):
        def __init__(self, ids: Any, *args: Any) -> None:
            trained.append(ids)
            super().__init__(ids, *args)

    monkeypatch.setattr(trainer, "Sequences", Recorded)
    recipe = settings(text_file, generate=20, epochs=1)
    report = thanos.recover(pruned, tmp_path / "out2", dense=tiny_llama, recipe=recipe)
    assert report.sequences == {"trained": 28, "held_out": 4}

    source = resolve_model(tiny_llama)
    calibration = make_calibration(source, recipe.text, torch.device("cpu"), lambda event: None)
    dense, child = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_llama, pruned))
    end = end_of_text_id(source.tokenizer(), source.config())
    made = generate_sequences(dense, calibration.ids[:8], calibration.bos_ids, 22, 0, end, lambda event: None)
    assert torch.equal(trained[0], torch.cat([calibration.ids[:8], made[:20]]))
    ids = torch.cat([calibration.ids[8:], made[20:]])
    with torch.no_grad():
        p, q = (model(input_ids=ids).logits.double().log_softmax(-1) for model in (dense, child))
    divergence = (p.exp() * (p - q)).sum(-1).mean(1)
    assert report.held_out_before == pytest.approx(divergence.mean().item(), rel=1e-4)
    assert report.history[0]["held_out_text"] == pytest.approx(divergence[:2].mean().item(), rel=1e-4)
    assert report.history[0]["held_out_generated"] == pytest.approx(divergence[2:].mean().item(), rel=1e-4)


def test_the_card_states_the_losses_by_kind_of_text() -> None:
    history = [
        {"step": 0, "held_out": 0.3, "held_out_text": 0.1, "held_out_generated": 0.4},
        {"step": 5, "held_out": 0.2, "held_out_text": 0.15, "held_out_generated": 0.22},
        {"step": 10, "held_out": 0.25, "held_out_text": None, "held_out_generated": 0.2},
    ]
    recovery: dict[str, Any] = {
        "held_out_before": 0.3, "held_out_after": 0.2, "best_step": 5, "history": history, "rate": 1e-3, "dense": "dense",
        "calibration": {"source": "a.txt", "sequence_length": 32}, "sequences": {"trained": 24, "held_out": 3},
        "masked_layers": 4, "recipe": {"epochs": 2, "generate": 16, "prompts": None},
    }  # fmt: skip
    sentence = recovery_sentence(recovery)
    assert (
        "24 × 32 tokens of a.txt, 16 of the sequences written by the dense model as continuations of pieces of it"
        in sentence
    )
    kinds = "(the text: 0.1000 → 0.1500; generated sequences: 0.4000 → 0.2200)."
    assert sentence.endswith(f"the KL divergence fell from 0.3000 to 0.2000 nats a token {kinds}")
    assert held_out_by_kind(recovery) == {"the text": (0.1, 0.15), "generated sequences": (0.4, 0.22)}
    assert held_out_by_kind(recovery | {"best_step": 10}) == {}, "a value is not finite"
    old = [{"step": 0, "held_out": 0.3}, {"step": 5, "held_out": 0.2}]
    assert held_out_by_kind(recovery | {"history": old}) == {}, "reports of older versions"


@pytest.mark.parametrize(("generate", "held_out"), [(0, 0), (4, 1), (16, 1), (20, 2), (512, 32)])
def test_one_more_in_sixteen_is_generated_to_be_held_out(generate: int, held_out: int, text_file: Path) -> None:
    recipe = settings(text_file, generate=generate)
    assert recipe.generated_held_out == held_out
    assert recipe.rows == 8 + generate


@pytest.mark.parametrize("same", [True, False])
def test_what_was_generated_is_kept_before_the_first_checkpoint(
    same: bool, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    pruned, out = prune(tiny_llama, tmp_path / "out", text_file), tmp_path / "out2"

    def stop(event: thanos.Event) -> None:
        if event.phase == "train":
            raise KeyboardInterrupt

    def go(generate: int, **how: Any) -> thanos.RecoveryReport:
        return thanos.recover(pruned, out, dense=tiny_llama, recipe=settings(text_file, generate=generate), **how)

    with pytest.raises(EndedEarly) as ended, resumable(RecoveryFolder(out)):
        go(8, on_event=stop)
    assert ended.value.hint("AGAIN") == "; 0 of 12 steps are finished, continue with: AGAIN"
    if not same:
        with pytest.raises(UserError, match="generate 8 → 4"):
            go(4, resume=True)
        assert go(4).sequences["trained"] == 12  # without --resume it starts over
        return
    phases: set[str] = set()
    report = go(8, resume=True, on_event=lambda event: phases.add(event.phase))
    assert "generate" not in phases
    assert report.sequences["trained"] == 16


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (-4, "generate must be a whole number, at least 0; got -4"),
        (1.5, "generate must be a whole number, at least 0; got 1.5"),
        (True, "generate must be a whole number, at least 0; got True"),
        (6, "generate 6 is not a multiple of batch 4; give a multiple of 4"),
    ],
)
def test_refusals(value: object, why: str, text_file: Path) -> None:
    with pytest.raises(RecipeError, match=why):
        settings(text_file, generate=value)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"segment": 1}, "segment must be a whole number, at least 2; got 1"),
        ({"prompt": -1, "generate": 4}, "prompt must be a whole number, at least 0; got -1"),
        ({"prompt": 4}, "prompt 4 has no meaning here; leave prompt out, or set generate above 0"),
        ({"prompts": "a.txt"}, "prompts a.txt has no meaning here; leave prompts out, or set generate above 0"),
        ({"prompts": "a.txt", "prompt": 4, "generate": 4}, "prompt 4 has no meaning with prompts"),
        (
            {"segment": 100, "vary": False},
            "segment 100 has no meaning here; leave segment out, or set vary, or generate",
        ),
    ],
)
def test_refused_pieces(changes: dict[str, Any], why: str, text_file: Path) -> None:
    with pytest.raises(RecipeError, match=why):
        settings(text_file, **{"vary": True, **changes})


def test_pieces_that_are_used(text_file: Path) -> None:
    for changes in ({"segment": 100, "vary": True}, {"segment": 100, "prompt": 0, "vary": False, "generate": 4}):
        recipe = settings(text_file, **changes)
        assert thanos.RecoveryRecipe.from_dict(recipe.to_dict()) == recipe


def test_parts_are_not_generated_again(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From each part on, the rest has the bits of a call without an interruption, whatever was drawn in between."""
    monkeypatch.setitem(continued.PIECES, "cpu", 3)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    text = torch.randint(3, model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    parts: list[Part] = []
    whole = generate_sequences(model, text, (1,), 8, 7, 0, lambda event: None, keep=parts.append)
    assert [len(part.ids) for part in parts] == [3, 3, 2]
    assert torch.equal(torch.cat([part.ids for part in parts]), whole)
    monkeypatch.setitem(continued.PIECES, "cpu", 5)  # the size of the parts is that of the interrupted call
    for count in (1, 2, 3):
        torch.rand(17)
        before = torch.get_rng_state()
        events: list[thanos.Event] = []
        again = generate_sequences(model, text, (1,), 8, 7, 0, events.append, done=parts[:count])
        assert torch.equal(again, whole)
        assert [event.done for event in events] == [6, 8][count - 1 :], "only what is missing is generated"
        length = 1 + 40 - 1  # BOS and a piece of the text without its first token
        assert [event.tokens for event in events] == [(event.done - 3 * count) * length for event in events]
        assert torch.equal(torch.get_rng_state(), before), "the state of other programs' draws is their own"


def test_memory_that_runs_out_costs_no_finished_part(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(continued.PIECES, "cpu", 4)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    text = torch.randint(3, model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    parts: list[Part] = []
    generate, sizes = model.generate, []

    def limited(ids: torch.Tensor, **settings: Any) -> torch.Tensor:
        sizes.append(len(ids))
        if len(ids) > 2 and len(sizes) > 1:
            raise torch.OutOfMemoryError
        return generate(ids, **settings)

    monkeypatch.setattr(model, "generate", limited)
    made = generate_sequences(model, text, (), 9, 7, 0, lambda event: None, keep=parts.append)
    assert sizes == [4, 4, 2, 2, 1]
    assert [len(part.ids) for part in parts] == [4, 2, 2, 1]
    assert torch.equal(torch.cat([part.ids for part in parts]), made)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_interrupted_generation_goes_on_with_the_next_part(
    count: int, tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """9 pieces, of which one is held out, in parts of 4. After the third part the sequences are not yet stored as a whole."""
    monkeypatch.setitem(continued.PIECES, "cpu", 4)
    pruned, out = prune(tiny_llama, tmp_path / "out", text_file), tmp_path / "out2"
    recipe = settings(text_file, generate=8, epochs=1)

    def stop(event: thanos.Event) -> None:
        if event.phase == "generate" and event.kind == "progress" and event.done == min(9, 4 * count):
            raise KeyboardInterrupt

    with pytest.raises(EndedEarly) as ended, resumable(RecoveryFolder(out)):
        thanos.recover(pruned, out, dense=tiny_llama, recipe=recipe, on_event=stop)
    assert ended.value.hint("AGAIN") == "; 0 of 4 steps are finished, continue with: AGAIN"
    with pytest.raises(UserError, match="seed 0 → 1"):
        thanos.recover(pruned, out, dense=tiny_llama, recipe=dataclasses.replace(recipe, seed=1), resume=True)
    events: list[thanos.Event] = []
    report = thanos.recover(pruned, out, dense=tiny_llama, recipe=recipe, resume=True, on_event=events.append)
    made = [event.done for event in events if event.phase == "generate" and event.kind == "progress"]
    assert made == [8, 9][count - 1 :]
    [begun] = [event.done for event in events if event.phase == "generate" and event.kind == "phase"] or [9]
    assert begun == min(9, 4 * count), "the time left is reckoned from what this run generates"
    assert not any(event.message.startswith("there is nothing to resume") for event in events)
    whole = thanos.recover(pruned, tmp_path / "whole", dense=tiny_llama, recipe=recipe)
    assert report.history == whole.history
    one, other = (folder / "model.safetensors" for folder in (out, tmp_path / "whole"))
    assert one.read_bytes() == other.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out2", "whole"]


def test_parts_of_another_device_are_discarded(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CUDA device has a random generator of its own, from which a CPU cannot go on."""
    monkeypatch.setitem(continued.PIECES, "cpu", 4)
    pruned, out = prune(tiny_llama, tmp_path / "out", text_file), tmp_path / "out2"
    recipe = settings(text_file, generate=8, epochs=1)

    def stop(event: thanos.Event) -> None:
        if event.phase == "generate" and event.kind == "progress":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        thanos.recover(pruned, out, dense=tiny_llama, recipe=recipe, on_event=stop)
    (stored,) = RecoveryFolder(out).steps.glob("pieces-*.safetensors")
    save_file(load_file(stored) | {"cuda": torch.zeros(16, dtype=torch.uint8)}, stored)
    made: list[int] = []

    def look(event: thanos.Event) -> None:
        if event.phase == "generate" and event.kind == "progress":
            made.append(event.done)

    thanos.recover(pruned, out, dense=tiny_llama, recipe=recipe, resume=True, on_event=look)
    assert made == [4, 8, 9]


class _Two(World):
    """One of two processes, whose meetings are noted; what rank 0 sends is given in advance for rank 1."""

    size = 2

    def __init__(self, rank: int, sent: Sequence[Any] = ()) -> None:
        self.rank, self._sent, self.met = rank, list(sent), list[Any]()

    def from_first(self, make: Any) -> Any:
        self.met.append(make() if self.rank == 0 else self._sent.pop(0))
        return self.met[-1]


def test_the_processes_meet_after_each_part(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.distributed ends a wait of more than half an hour, and the whole text may take longer."""
    monkeypatch.setitem(continued.PIECES, "cpu", 3)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    text = torch.randint(3, model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    work = RecoveryFolder(tmp_path / "out2")
    work.start({"steps": 1})
    work.steps.mkdir()

    def go(world: World, *, resume: bool = False) -> torch.Tensor:
        arguments = (model, text, (), 8, 7, 0, lambda event: None, work, world)
        return kept_sequences(*arguments, Pieces(), resume=resume)

    alone = generate_sequences(model, text, (), 8, 7, 0, lambda event: None)
    first = _Two(0)
    assert torch.equal(go(first), alone)
    assert [one is None for one in first.met] == [True, True, True, False]
    other = _Two(1, first.met)
    assert torch.equal(go(other), alone)
    assert len(other.met) == 4
    again = _Two(0)
    assert torch.equal(go(again, resume=True), alone)
    assert len(again.met) == 1
    assert torch.equal(go(_Two(1, again.met), resume=True), alone)
    assert [path.name for path in work.steps.iterdir()] == ["generated.safetensors"]
