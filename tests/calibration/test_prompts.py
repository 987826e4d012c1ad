"""Generated pieces that begin with the user's prompts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import thanos
from helpers import stopped_at, tiny_model
from recovering import prune, settings
from thanos.calibration import continued
from thanos.calibration.continued import Pieces, generate_sequences
from thanos.calibration.generation import Part
from thanos.calibration.making import make_calibration
from thanos.calibration.prompts import prompt_texts, with_prompts
from thanos.calibration.windows import Calibration
from thanos.errors import DataError, UserError
from thanos.events import LOG_NAME
from thanos.model.source import resolve_model
from thanos.recovery.generated import generated_text
from thanos.run.resume import check_same_run

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
TEMPLATE = CHAT + "{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A file of four prompts of different lengths, with several kinds of blank lines between them."""
    path = tmp_path / "private" / "prompts.txt"
    path.parent.mkdir()
    path.write_text("\n\na b\n\n \t\nc\nd  e\n\n\nf\r\n\r\ng h a b c\n\n")
    return path


def test_prompts_of_a_text_file_are_separated_by_blank_lines(prompts: Path) -> None:
    assert prompt_texts(str(prompts), None, print) == ["a b", "c\nd  e", "f", "g h a b c"]


@pytest.mark.parametrize("text", ["\ufeffa\n\n\r\n b", "  \na\n\n b\n   ", "\r\n\r\na\r\n\r\n b\r\n"])
def test_what_stands_between_the_prompts_belongs_to_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.TXT"
    path.write_bytes(text.encode())
    assert prompt_texts(str(path), None, print) == ["a", " b"]


def test_each_row_of_another_file_is_a_prompt(tiny_llama: Path, tmp_path: Path) -> None:
    """A chat ends with the header of the reply that the model is to write."""
    tokenizer, notes = AutoTokenizer.from_pretrained(tiny_llama), list[str]()
    tokenizer.chat_template = TEMPLATE
    rows, chats = tmp_path / "rows.jsonl", tmp_path / "chats.jsonl"
    texts = [{"text": "one\n\ntwo"}, {"text": ""}, {"text": "half \ud800"}]
    rows.write_text("".join(json.dumps(row) + "\n" for row in texts))
    asked = {"role": "user", "content": "Hello"}
    answered = [asked, {"role": "assistant", "content": "Yes"}, {"role": "assistant", "content": "?"}]
    conversations = [[asked], answered, answered[1:]]  # the last one has no question
    chats.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in conversations))
    hello = "<user>Hello</><assistant>"
    assert prompt_texts(str(rows), None, notes.append) == ["one\n\ntwo", "half \ufffd"]
    assert "U+FFFD replaces it" in notes[0]
    assert prompt_texts(str(chats), tokenizer, notes.append) == [hello, hello]
    assert notes[-1] == f"{chats} has 1 chat with replies of the model alone, left out"
    both = prompt_texts(f"{rows},{chats}", tokenizer, notes.append)
    assert both == ["one\n\ntwo", "half \ufffd", hello, hello]
    with pytest.raises(DataError, match="has no chat template"):
        prompt_texts(str(chats), None, print)


@pytest.mark.parametrize("bos", [(), (1,), (1, 3)])
@pytest.mark.parametrize("architecture", ["llama", "opt-125m", "gpt-2", "gpt-neox", "bloom", "mistral"])
def test_each_piece_is_a_whole_prompt_and_its_greedy_continuation(architecture: str, bos: tuple[int, ...]) -> None:
    """With logits so far apart that sampling has no choice, also where positions are learned. A prompt may hold end-of-text."""
    model = tiny_model(architecture, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    end = model.generation_config.eos_token_id
    prompts = [[11, 12], [21, 22, 23 if end is None else end, 24, 25], [31]]
    text = torch.zeros(1, len(bos) + 40, dtype=torch.int64)
    made = generate_sequences(model, text, bos, 5, 0, 0, lambda event: None, Pieces(16, prompts=prompts))
    assert made.shape == (5, len(bos) + 40)
    assert (made[:, : len(bos)] == torch.tensor(bos)).all()
    stream, used, wanted = made[:, len(bos) :].flatten().tolist(), Counter[int](), list[int]()
    while len(wanted) < len(stream):
        [number] = [i for i, prompt in enumerate(prompts) if stream[len(wanted) :][: len(prompt)] == prompt]
        used[number] += 1
        ids = torch.tensor([[*bos, *prompts[number]]])
        for _ in range(16 - len(prompts[number])):
            logits = model(input_ids=ids).logits[0, -1]
            if end is not None:
                logits[end] = -torch.inf
            ids = torch.cat([ids, logits.argmax()[None, None]], 1)
        wanted += ids[0, len(bos) :].tolist()
    assert stream == wanted[: len(stream)]
    assert max(used.values()) - min(used.values()) <= 1, "all prompts are used equally often"


def test_parts_of_continued_prompts_are_not_generated_again(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(continued.PIECES, "cpu", 3)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    text, parts = torch.zeros(1, 40, dtype=torch.int64), list[Part]()
    pieces = Pieces(20, prompts=[[5, 6, 7], [8]])
    whole = generate_sequences(model, text, (), 4, 7, 0, lambda event: None, pieces, keep=parts.append)
    assert [len(part.ids) for part in parts] == [3, 3, 2]
    again = generate_sequences(model, text, (), 4, 7, 0, lambda event: None, pieces, done=parts[:2])
    assert torch.equal(again, whole)
    other = generate_sequences(model, text, (), 4, 8, 0, lambda event: None, pieces)
    assert not torch.equal(other, whole)


def test_a_pruning_with_prompts(prompts: Path, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = thanos.Recipe(
        samples=4, sequence_length=32, calibration=str(text_file), device="cpu", generate=3, prompts=str(prompts)
    )
    out = tmp_path / "out"
    report = thanos.prune(tiny_llama, out, recipe)
    source = resolve_model(tiny_llama)
    plain = make_calibration(
        source, dataclasses.replace(recipe, generate=0, prompts=None), torch.device("cpu"), lambda event: None
    )
    tokenizer, bos = source.tokenizer(), plain.bos_ids
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a b", "c\nd  e", "f", "g h a b c")]
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    end = model.generation_config.eos_token_id
    new = generate_sequences(model, plain.ids, bos, 3, 0, end, lambda event: None, Pieces(prompts=ids))
    wanted = dataclasses.replace(plain, ids=torch.cat([new, plain.ids]), generated=3)
    assert report.calibration["sha256"] == wanted.sha256
    sha256 = hashlib.sha256(prompts.read_bytes()).hexdigest()
    assert report.calibration["prompts_sha256"] == sha256
    assert report.recipe["prompts"] == "prompts.txt"
    assert "continues the prompts in prompts.txt" in (out / "README.md").read_text()
    assert "--calibration PATH --prompts PATH`" in (out / "README.md").read_text()
    toml = (out / "recipe.toml").read_text()
    assert f"# The text of the prompts is local; the SHA-256 of its content is {sha256}.\n" in toml
    assert "recipe.toml --calibration PATH --prompts PATH\n" in toml
    for path in out.iterdir():
        assert b"private" not in path.read_bytes(), path.name


def test_an_interrupted_pruning_goes_on_with_the_same_prompts(
    prompts: Path, tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = thanos.Recipe(
        samples=4, sequence_length=32, calibration=str(text_file), device="cpu", generate=3, prompts=str(prompts)
    )
    whole = thanos.prune(tiny_llama, tmp_path / "whole", recipe)
    with pytest.raises(KeyboardInterrupt):
        thanos.prune(tiny_llama, tmp_path / "out", recipe, on_event=stopped_at(1))
    kept = prompts.read_bytes()
    prompts.write_text("e d c\n")
    with pytest.raises(UserError, match=r"prompts prompts\.txt \(SHA-256 \w{16}\) → prompts\.txt \(SHA-256"):
        thanos.prune(tiny_llama, tmp_path / "out", recipe, resume=True)
    prompts.unlink()
    with pytest.raises(DataError, match=r"prompts\.txt does not exist"):
        thanos.prune(tiny_llama, tmp_path / "out", recipe, resume=True)
    prompts.write_bytes(kept)

    def fail(*arguments: Any, **more: Any) -> None:
        raise AssertionError("the model generates again")

    monkeypatch.setattr("transformers.GenerationMixin.generate", fail)
    resumed = thanos.prune(tiny_llama, tmp_path / "out", recipe, resume=True)
    assert resumed.calibration == whole.calibration
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole"))
    assert first == second


def test_other_prompts_are_another_run(prompts: Path, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    pruned, out = prune(tiny_llama, tmp_path / "pruned", text_file), tmp_path / "out2"
    recipe = settings(text_file, generate=8, epochs=1, prompts=str(prompts))

    def stop(event: thanos.Event) -> None:
        if event.phase == "train":
            raise KeyboardInterrupt

    def go(**how: Any) -> thanos.RecoveryReport:
        return thanos.recover(pruned, out, dense=tiny_llama, recipe=recipe, **how)

    with pytest.raises(KeyboardInterrupt):
        go(on_event=stop)
    kept, changed = prompts.read_bytes(), "e d c\n"
    prompts.write_text(changed)
    with pytest.raises(UserError, match=r"prompts prompts\.txt \(SHA-256 \w{16}\) → prompts\.txt \(SHA-256"):
        go(resume=True)
    prompts.write_bytes(kept)
    report = go(resume=True)
    assert report.sequences == {"trained": 16, "held_out": 3}
    assert report.recipe["prompts"] == "prompts.txt"
    assert report.calibration["prompts_sha256"] == hashlib.sha256(prompts.read_bytes()).hexdigest()
    assert (
        "8 of the sequences written by the dense model as continuations of the prompts in prompts.txt"
        in (out / "README.md").read_text()
    )
    assert "private" not in (out / LOG_NAME).read_text() + (out / "recovery.json").read_text()
    assert go(resume=True).history == report.history, "a complete run has nothing to do"
    prompts.write_text(changed)
    with pytest.raises(UserError, match=r"another run made it: prompts prompts\.txt"):
        go(resume=True)


def test_the_pieces_of_a_recovery_begin_with_the_prompts(
    prompts: Path, tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from thanos.recovery import run

    made: list[torch.Tensor] = []

    def recorded(*arguments: Any, **how: Any) -> torch.Tensor:
        made.append(generated_text(*arguments, **how))
        return made[-1]

    monkeypatch.setattr(run, "generated_text", recorded)
    pruned = prune(tiny_llama, tmp_path / "pruned", text_file)
    prompts.write_text("a b")
    recipe = settings(text_file, generate=8, epochs=1, prompts=str(prompts))
    thanos.recover(pruned, tmp_path / "out2", dense=tiny_llama, recipe=recipe)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    bos = len(tokenizer("a b")["input_ids"]) - len(tokenizer("a b", add_special_tokens=False)["input_ids"])
    begun = tokenizer("a b", add_special_tokens=False)["input_ids"]
    assert made[0].shape == (9, 32)
    assert (made[0][:, bos:][:, : len(begun)] == torch.tensor(begun)).all(), "a piece is a whole sequence here"


@pytest.mark.parametrize(
    ("content", "changes", "why"),
    [
        (None, {}, r"text file .*prompts\.txt does not exist"),
        ("\n \n\n", {}, r"contain no prompt; write at least one \(in a \.txt file blank lines separate them\)"),
        (
            "a b c d e f g h a b c d\n\nx",
            {"segment": 12},
            r"prompt 1 of .* has \d+ tokens, but half of a generated piece is 6; shorten it, or raise --segment",
        ),
        ("x\n\n" + "a b c d e f g h " * 8, {}, r"prompt 2 of .* has \d+ tokens, .* or raise --sequence-length"),
    ],
)
@pytest.mark.parametrize("command", ["prune", "recover"])
def test_refused_prompts(
    command: str,
    content: str | None,
    changes: dict[str, Any],
    why: str,
    tiny_llama: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    path, out = tmp_path / "prompts.txt", tmp_path / "out2"
    if content is not None:
        path.write_text(content)
    pruned = prune(tiny_llama, tmp_path / "pruned", text_file) if command == "recover" else None

    def run() -> None:
        if pruned is not None:
            recipe = settings(text_file, generate=8, vary=True, prompts=str(path), **changes)
            thanos.recover(pruned, out, dense=tiny_llama, recipe=recipe)
        else:
            values: dict[str, Any] = {"samples": 4, "sequence_length": 32, "calibration": str(text_file)}
            thanos.prune(
                tiny_llama, out, thanos.Recipe(**values, **changes, generate=4, prompts=str(path), device="cpu")
            )

    with pytest.raises(DataError, match=why):
        run()
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(
        [*(["prompts.txt"] if content is not None else []), *(["pruned"] if pruned is not None else [])]
    )


def test_token_ids_in_memory_need_a_tokenizer_for_prompts(prompts: Path, tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    ids, recipe = torch.randint(3, 200, (4, 32)), thanos.Recipe(generate=2, prompts=str(prompts), device="cpu")
    with pytest.raises(DataError, match="prompts need the model's tokenizer"):
        thanos.prune_model(model, ids, recipe=recipe)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    report = thanos.prune_model(model, ids, recipe=recipe, tokenizer=tokenizer)
    assert report.calibration["generated"] == 2
    assert report.recipe["prompts"] == "prompts.txt"


def test_given_windows_must_continue_the_prompts_of_the_recipe(
    prompts: Path, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe = thanos.Recipe(
        samples=4, sequence_length=32, calibration=str(text_file), device="cpu", generate=2, prompts=str(prompts)
    )
    made = make_calibration(resolve_model(tiny_llama), recipe, torch.device("cpu"), lambda event: None)
    with pytest.raises(
        DataError, match=r"continues prompts with the SHA-256 \w{64}, but those of the recipe have None"
    ):
        thanos.prune(tiny_llama, tmp_path / "out", dataclasses.replace(recipe, prompts=None), calibration=made)
    prompts.write_text("e")
    with pytest.raises(DataError, match="make it with the recipe's prompts"):
        thanos.prune(tiny_llama, tmp_path / "out", recipe, calibration=made)
    assert not (tmp_path / "out").exists()


def test_a_local_folder_with_the_name_of_a_data_set_has_a_hash(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c4").mkdir()
    Path("c4/one.txt").write_text("a b")
    recipe = thanos.Recipe(generate=1, prompts="c4")
    windows = Calibration(torch.zeros(1, 4, dtype=torch.int64), "text.txt", "packed", 0, 1)
    assert with_prompts(windows, recipe).prompts_sha256 == hashlib.sha256(b"a b").hexdigest()


def test_a_run_without_prompts_can_be_resumed_by_a_version_that_knows_them() -> None:
    assert check_same_run({"recipe": {"seed": 0}}, {"recipe": {"seed": 0, "prompts": None}, "machine": {}}) == []


@pytest.mark.parametrize("longest", [4, 100])
def test_the_plan_times_as_many_new_tokens_as_it_counts(
    longest: int, tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It continues one piece for each sequence, by 4 and by 12 tokens more than the shortest prompt has."""
    from thanos.planning import generating

    seen: list[tuple[int, ...]] = []

    def recorded(model: Any, ids: Any, bos: Any, count: int, seed: int, end: int, emit: Any, pieces: Pieces) -> None:
        seen.append((ids.shape[1] - len(bos), pieces.segment, pieces.prompt, count))

    monkeypatch.setattr(generating, "generate_sequences", recorded)
    prompts = tmp_path / "prompts.txt"
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    words = ["a"]
    while len(tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]) < longest:
        words.append("b")
    prompts.write_text("c d\n\n" + " ".join(words))
    size = len(tokenizer("c d", add_special_tokens=False)["input_ids"])
    recipe = thanos.Recipe(
        samples=2,
        sequence_length=240,
        calibration=str(text_file),
        device="cpu",
        generate=3,
        segment=230,
        prompts=str(prompts),
    )
    planned = thanos.plan(tiny_llama, tmp_path / "out", recipe)
    assert planned.phases["calibration"].seconds >= 0
    assert [place[:3] for place in seen] == [(2 * size + new, 2 * size + new, size) for new in (4, 12)]
    assert len({place[3] for place in seen}) == 1
