"""The beginning-of-text token (BOS): who adds it, where it stands in windows, and that nobody else sees a change."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import thanos
from helpers import POSITIONS, WORDS, prose, save_tiny, tiny_model, tiny_tokenizer
from thanos.calibration.kept import read_windows, write_windows
from thanos.calibration.windows import Calibration, build_calibration
from thanos.cli import run
from thanos.errors import DataError
from thanos.evaluation.perplexity import Evaluation, choose_bos
from thanos.model.bos import added_bos

BOS, END = 1, 2
ID = {word: 4 + i for i, word in enumerate(WORDS)}
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }} {% endfor %}"


def encode(text: str) -> list[int]:
    """The tiny tokenizer by hand, without special tokens."""
    return [ID[word] for word in text.split()]


def build(source: Path, *, samples: int, length: int, begins: bool = True, **arguments: Any) -> Calibration:
    settings = {"seed": 0, "end_of_text_id": END, "tokenizer": tiny_tokenizer(begins=begins), **arguments}
    return build_calibration(str(source), samples=samples, sequence_length=length, **settings)


def rows_file(path: Path, rows: list[Any], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: row}) + "\n" for row in rows), encoding="utf-8")
    return path


# --- who begins texts with BOS ------------------------------------------------------------------------------------------


def test_a_tokenizer_must_add_bos() -> None:
    assert added_bos(tiny_tokenizer()) == (BOS,)
    assert added_bos(tiny_tokenizer(begins=False)) == (), "it defines BOS, but adds none"
    undefined = copy.deepcopy(tiny_tokenizer())
    undefined.bos_token = None
    assert added_bos(undefined) == (BOS,), "it does not call it so, but adds it"


# --- calibration --------------------------------------------------------------------------------------------------------


def test_packed_windows_begin_with_bos_and_hold_one_token_of_text_less(tmp_path: Path) -> None:
    documents = [prose(5 + i % 4, seed=i) for i in range(20)]
    made = build(rows_file(tmp_path / "a.jsonl", documents), samples=4, length=20)
    stream = [token for text in documents for token in (END, *encode(text))][1:]
    assert made.ids.tolist() == [[BOS, *stream[19 * i : 19 * i + 19]] for i in range(4)]
    assert (made.rule, made.bos_ids, made.ids.shape, made.ids.dtype) == ("packed", (BOS,), (4, 20), torch.int64)
    assert made.to_dict()["bos_ids"] == [BOS]


@pytest.mark.parametrize("seed", [0, 3])
def test_one_document_is_cut_behind_each_bos(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "a.txt"
    path.write_text(prose(400, seed=5))
    ids = build(path, samples=5, length=30, seed=seed).ids
    assert (ids[:, 0] == BOS).all()
    text = ids[:, 1:].flatten().tolist()
    places = [i for i in range(400) if encode(prose(400, seed=5))[i : i + len(text)] == text]
    assert places if seed else places[0] == 0, "one piece, in order"


def test_random_windows_begin_with_bos_and_a_piece_of_one_document(tmp_path: Path) -> None:
    documents = [prose(40 + i, seed=i) for i in range(12)]
    source = rows_file(tmp_path / "a.jsonl", documents)
    made = build(source, samples=8, length=31, seed=4)
    # With one token less of text, the draw is that of windows without BOS.
    plain = build(source, samples=8, length=30, seed=4, begins=False)
    assert made.rule == plain.rule == "random-window"
    assert (made.ids[:, 0] == BOS).all()
    assert torch.equal(made.ids[:, 1:], plain.ids)
    assert plain.bos_ids == ()
    for window in made.ids[:, 1:].tolist():
        assert any(window == ids[i : i + 30] for ids in map(encode, documents) for i in range(len(ids) - 29))


def test_exactly_enough_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(prose(57))
    assert build(path, samples=3, length=20).ids[:, 1:].flatten().tolist() == encode(prose(57))
    with pytest.raises(DataError, match="2 windows of 21 tokens, but --samples is 3"):
        build(path, samples=3, length=21)
    with pytest.raises(DataError, match=r"57 tokens, but --sequence-length is 59, of which the first is the beginning"):
        build(path, samples=1, length=59)


def test_text_that_begins_with_bos_gets_no_second_one(tmp_path: Path) -> None:
    words = prose(24).split()
    documents = [f"<s> {' '.join(words[:12])}", f"<s> {' '.join(words[12:])}"]
    source = rows_file(tmp_path / "a.jsonl", documents)
    stream = [*encode(prose(24))[:12], END, *encode(prose(24))[12:]]
    assert build(source, samples=2, length=13).ids.tolist() == [[BOS, *stream[:12]], [BOS, *stream[12:24]]]
    drawn = build(source, samples=2, length=12)
    assert drawn.rule == "random-window"
    assert (drawn.ids == BOS).sum(1).tolist() == [1, 1]


def test_chats_whose_template_writes_bos_get_no_second_one(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = TEMPLATE
    chats = [[{"role": "user", "content": prose(9, seed=i)}] for i in range(4)]
    made = build(rows_file(tmp_path / "a.jsonl", chats, "messages"), samples=2, length=14, tokenizer=tokenizer)
    stream = [token for i in range(4) for token in (END, *encode(prose(9, seed=i)))][1:]
    assert made.ids.tolist() == [[BOS, *stream[:13]], [BOS, *stream[13:26]]]


def test_the_models_own_text_begins_with_its_one_bos() -> None:
    model = tiny_model(vocab_size=12)
    made = build(Path("self"), samples=1600, length=2, model=model)
    assert (made.rule, made.bos_ids) == ("generated", (BOS,))
    assert (made.ids[:, 0] == BOS).all()
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([[BOS]])).logits[0, -1].double().softmax(-1)
    expected = expected.clone()
    expected[END] = 0  # a window may not end early
    expected /= expected.sum()
    found = torch.bincount(made.ids[:, 1], minlength=12).double() / 1600
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / 1600).sqrt() + 1e-12).all()


def test_windows_on_the_disk_keep_their_bos_and_older_ones_are_made_again(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = tmp_path / "w.safetensors"
    for bos in ((), (BOS,), (5, BOS)):
        made = Calibration(torch.tensor([[1, 5], [1, 6]]), "here", "packed", 3, 2, bos)
        write_windows(path, made)
        found = read_windows(path, "here")
        assert found is not None
        assert found.to_dict() == made.to_dict()
    save_file(load_file(path), path, metadata={"rule": "packed", "seed": "3", "documents": "2"})
    assert read_windows(path, "here") is None, "whether they begin with BOS, nothing says"


def test_a_run_records_that_its_windows_begin_with_bos(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = thanos.Recipe(method="magnitude", calibration=str(text_file), samples=4, sequence_length=32, device="cpu")
    report = thanos.prune(tiny_llama, tmp_path / "out", recipe)
    assert json.loads((tmp_path / "out" / "pruning.json").read_text())["calibration"]["bos_ids"] == [BOS]
    assert report.calibration["sha256"] == build(text_file, samples=4, length=32).sha256
    assert "begins with the beginning-of-text token" in (tmp_path / "out" / "README.md").read_text()
    tiny_tokenizer(begins=False).save_pretrained(tmp_path / "other")
    tiny_model().save_pretrained(tmp_path / "other")
    report = thanos.prune(tmp_path / "other", tmp_path / "out2", recipe)
    assert report.calibration["bos_ids"] == []
    assert report.calibration["sha256"] == build(text_file, samples=4, length=32, begins=False).sha256
    assert "begins with" not in (tmp_path / "out2" / "README.md").read_text()


# --- evaluation ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def needy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose logits are flat where BOS is in the context, and wild where it is not."""
    model: Any = tiny_model(num_hidden_layers=1)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0.0  # the dimension that is BOS's alone
        model.model.embed_tokens.weight[BOS] = torch.nn.functional.one_hot(torch.tensor(0), 32) * 10.0
        attention = model.model.layers[0].self_attn
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            projection.weight.zero_()  # q = 0: every position attends to all before it alike
        attention.v_proj.weight[0, 0] = 1.0
        attention.o_proj.weight[0, 0] = 1e4
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight *= 5
        model.lm_head.weight[:, 0] = 0.0
    folder = tmp_path_factory.mktemp("needy") / "model"
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def by_hand(model: Path, text: str, length: int, *, window: bool, most: int | None = None) -> tuple[float, int]:
    """Perplexity by transformers' own loss over windows that are made here, and the number of tokens scored."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model).eval()
    ids = encode(text)
    if window:
        windows = [[BOS, *ids[i : i + length - 1]] for i in range(0, len(ids) - length + 2, length - 1)]
    else:
        ids = [BOS, *ids]
        windows = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    windows = windows[:most]
    with torch.inference_mode():
        losses = [float(network(input_ids=torch.tensor([w]), labels=torch.tensor([w])).loss) for w in windows]
    return math.exp(sum(losses) / len(losses)), len(windows) * (length - 1)


def measure(model: Path, text: Path, **arguments: Any) -> Evaluation:
    return thanos.evaluate(model, text=str(text), **{"sequence_length": 40, "device": "cpu", **arguments})


@pytest.mark.parametrize("length", [2, 3, 40, POSITIONS])
def test_bos_in_each_window_is_scored_as_transformers_does(tiny_llama: Path, text_file: Path, length: int) -> None:
    text = text_file.read_text(encoding="utf-8")
    for bos in ("window", "text"):
        found = measure(tiny_llama, text_file, sequence_length=length, max_windows=20, bos=bos)
        expected, tokens = by_hand(tiny_llama, text, length, window=bos == "window", most=20)
        assert found.perplexity == pytest.approx(expected, rel=1e-4)
        assert (found.bos, found.tokens, found.sequence_length) == (bos, tokens, length)


def test_a_single_window_begins_with_bos_either_way_so_nothing_is_tried(tiny_llama: Path, text_file: Path) -> None:
    notes: list[str] = []
    one = measure(tiny_llama, text_file, max_windows=1, on_event=lambda event: notes.append(event.message))
    assert not any(notes)
    assert one.bos == "text"
    for bos in ("text", "window"):
        assert measure(tiny_llama, text_file, max_windows=1, bos=bos).mean_loss == one.mean_loss
    measure(tiny_llama, text_file, max_windows=2, on_event=lambda event: notes.append(event.message))
    assert sum("the first windows have perplexity" in note for note in notes) == 1


def test_the_remainder_counts_the_bos_of_each_window(tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(prose(57))
    assert measure(tiny_llama, path, sequence_length=20, bos="window").windows == 3
    path.write_text(prose(56))
    assert measure(tiny_llama, path, sequence_length=20, bos="window").windows == 2
    with pytest.raises(DataError, match=r"56 tokens, fewer than one window of 58, of which the first is"):
        measure(tiny_llama, path, sequence_length=58, bos="window")


def test_a_model_that_needs_bos_gets_it_in_each_window(needy: Path, text_file: Path) -> None:
    text = text_file.read_text(encoding="utf-8")
    without, _ = by_hand(needy, text, 40, window=False)
    within, tokens = by_hand(needy, text, 40, window=True)
    assert within < 0.5 * without
    notes: list[str] = []
    found = measure(needy, text_file, on_event=lambda e: notes.append(e.message) if e.kind == "note" else None)
    assert (found.bos, found.tokens) == ("window", tokens)
    assert found.perplexity == pytest.approx(within, rel=1e-4)
    (note,) = notes
    assert "BOS is put at the start of each window" in note
    assert found.to_dict()["bos"] == "window"


def test_the_dense_model_decides_for_both(needy: Path, tiny_llama: Path, text_file: Path) -> None:
    plain = save_tiny(Path(needy).parent / "other", seed=3)
    for dense, model, expected in ((needy, plain, "window"), (plain, needy, "text")):
        window = expected == "window"
        found = measure(model, text_file, dense=dense)
        text = text_file.read_text(encoding="utf-8")
        assert found.bos == expected
        assert found.perplexity == pytest.approx(by_hand(model, text, 40, window=window)[0], rel=1e-4)
        assert found.dense_perplexity == pytest.approx(by_hand(dense, text, 40, window=window)[0], rel=1e-4)


def test_ten_percent_decide(monkeypatch: pytest.MonkeyPatch, text_file: Path) -> None:
    """By the losses of the windows that do not begin with BOS anyway."""
    import thanos.evaluation.perplexity

    text, tokenizer = text_file.read_text(encoding="utf-8"), tiny_tokenizer()
    ids = encode(text)
    for factor, expected in ((0.89, "window"), (0.91, "text"), (1.2, "text")):
        seen: list[list[list[int]]] = []

        def score(model: Any, reference: Any, emit: Any, seen: Any = seen, factor: float = factor) -> list[float]:
            seen.append(reference.windows.tolist())
            loss = 3.0 + (math.log(factor) if reference.windows[0, 0] == BOS else 0.0)
            return [loss * reference.windows[:, 1:].numel(), 0, 0, 0]

        monkeypatch.setattr(thanos.evaluation.perplexity, "score", score)
        assert choose_bos("auto", text, tokenizer, tiny_model(), 40, lambda event: None) == expected
        usual, begun = seen
        assert usual == [[*ids[39 + 40 * i : 79 + 40 * i]] for i in range(len(usual))]
        assert begun == [[BOS, *ids[39 + 39 * i : 78 + 39 * i]] for i in range(len(usual))]
        assert len(usual) > 100


def test_without_a_bos_nothing_is_measured_twice(text_file: Path, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "m")
    tiny_tokenizer(begins=False).save_pretrained(tmp_path / "m")
    notes: list[Any] = []
    found = measure(tmp_path / "m", text_file, on_event=lambda e: notes.append(e) if e.kind == "note" else None)
    asked = measure(tmp_path / "m", text_file, bos="text")
    ids = encode(text_file.read_text(encoding="utf-8"))
    with torch.inference_mode():
        model = tiny_model()
        windows = [torch.tensor([ids[i : i + 40]]) for i in range(0, len(ids) - 39, 40)]
        losses = [float(model(input_ids=w, labels=w).loss) for w in windows]
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert (found.bos, asked.bos, notes) == ("none", "none", [])
    assert asked.text_sha256 == found.text_sha256
    by_choice = measure(tmp_path / "m", text_file, bos="window")
    assert by_choice.bos == "window"
    text = text_file.read_text(encoding="utf-8")
    assert by_choice.perplexity == pytest.approx(by_hand(tmp_path / "m", text, 40, window=True)[0], rel=1e-4)


def test_text_that_begins_with_bos_has_it_once(tiny_llama: Path, tmp_path: Path) -> None:
    plain, begun = tmp_path / "plain.txt", tmp_path / "begun.txt"
    plain.write_text(prose(200))
    begun.write_text("<s> " + prose(200))
    for bos in ("text", "window"):
        hashes = {measure(tiny_llama, path, bos=bos).text_sha256 for path in (plain, begun)}
        assert len(hashes) == 1, bos


def test_choices_that_cannot_be(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^--bos: must be one of auto, window, text; got 'always'"):
        measure(tiny_llama, text_file, bos="always")
    tokenizer = copy.deepcopy(tiny_tokenizer(begins=False))
    tokenizer.bos_token = None
    tiny_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        DataError, match="--bos: window asks for a beginning-of-text token, which the tokenizer does not have"
    ):
        measure(tmp_path, text_file, bos="window")


def test_the_command_says_where_bos_stands(
    needy: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "found.json"
    arguments = [
        "eval",
        str(needy),
        "--text",
        str(text_file),
        "--sequence-length",
        "40",
        "--max-windows",
        "9",
        "--quiet",
    ]
    for given, stored, shown in (
        ([], "window", "at the start of each window"),
        (["--bos", "window"], "window", "at the start of each window"),
        (["--bos", "text"], "text", "at the start of the text only"),
    ):
        assert run([*arguments, *given, "--json", str(path)]) == 0
        assert shown in capsys.readouterr().out
        values = json.loads(path.read_text())
        assert values["bos"] == stored
        text = text_file.read_text(encoding="utf-8")
        expected, _ = by_hand(needy, text, 40, window=stored == "window", most=9)
        assert values["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert run([*arguments, "--bos", "never"]) == 2
    assert "auto, window, text" in capsys.readouterr().err


def test_a_shared_reference_says_where_bos_stands(needy: Path, text_file: Path) -> None:
    from thanos.evaluation.scoring import Reference
    from thanos.evaluation.windows import cut_windows
    from thanos.model.loading import load_model
    from thanos.model.source import resolve_model

    source = resolve_model(needy)
    model, text = load_model(source), text_file.read_text(encoding="utf-8")
    windows = cut_windows(text, source.tokenizer(), model, "prose", 40, 5, "window")
    shared = Reference(text="prose", windows=windows, bos="window")
    found = thanos.evaluate(needy, reference=shared, device="cpu")
    assert (found.bos, found.text_sha256) == ("window", measure(needy, text_file, max_windows=5).text_sha256)
    assert replace(shared, bos="text").bos == "text"


def test_a_shared_reference_of_a_single_window_needs_no_choice_either(needy: Path, text_file: Path) -> None:
    from thanos.evaluation.reference import make_reference
    from thanos.events import Event
    from thanos.model.loading import load_model
    from thanos.model.source import resolve_model

    source, notes = resolve_model(needy), list[Event]()
    model = load_model(source)
    settings: dict[str, Any] = {
        "text": text_file.read_text(encoding="utf-8"),
        "name": "prose",
        "sequence_length": 40,
        "bos": "auto",
        "emit": notes.append,
    }
    one = make_reference(source, model, max_windows=1, **settings)
    assert (one.bos, notes) == (measure(needy, text_file, max_windows=1).bos, [])
    assert make_reference(source, model, max_windows=2, **settings).bos == "window"
