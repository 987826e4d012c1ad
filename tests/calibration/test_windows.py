"""Calibration windows follow the rule that they name, come from the seed alone, and carry a hash of their ids."""

from __future__ import annotations

import hashlib
import json
import random
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import POSITIONS, WORDS, prose, tiny_model, tiny_tokenizer
from thanos.calibration.windows import Calibration, build_calibration
from thanos.errors import DataError
from thanos.events import Event

END = 2
ID = {word: 4 + i for i, word in enumerate(WORDS)}


def encode(text: str) -> list[int]:
    """The tiny tokenizer by hand, without special tokens."""
    return [ID[word] for word in text.split()]


def write_rows(path: Path, documents: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return str(path)


def build(
    source: str, *, samples: int, length: int, seed: int = 0, begins: bool = False, **arguments: Any
) -> Calibration:
    """Windows by a tokenizer that begins no text with BOS, unless ``begins``."""
    tokenizer = tiny_tokenizer(begins=begins)
    return build_calibration(
        source, tokenizer, samples=samples, sequence_length=length, seed=seed, end_of_text_id=END, **arguments
    )


@pytest.fixture(scope="module")
def long_documents() -> list[str]:
    """Twelve documents of 40 to 95 tokens, with short and empty ones between."""
    documents: list[str] = []
    for i in range(12):
        documents += [prose(40 + 5 * i, seed=i), "", prose(7, seed=100 + i)]
    return documents


@pytest.fixture(scope="module")
def long_source(tmp_path_factory: pytest.TempPathFactory, long_documents: list[str]) -> str:
    return write_rows(tmp_path_factory.mktemp("long") / "long.jsonl", long_documents)


@pytest.fixture(scope="module")
def short_documents() -> list[str]:
    return [prose(5 + i % 4, seed=i) for i in range(20)]


@pytest.fixture(scope="module")
def short_source(tmp_path_factory: pytest.TempPathFactory, short_documents: list[str]) -> str:
    return write_rows(tmp_path_factory.mktemp("short") / "short.jsonl", short_documents)


def homes(window: list[int], documents: list[str]) -> list[int]:
    """The documents of which a window is a substring, found by looking everywhere."""
    found = []
    for index, text in enumerate(documents):
        ids = encode(text)
        if any(ids[i : i + len(window)] == window for i in range(len(ids) - len(window) + 1)):
            found.append(index)
    return found


# --- random windows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2, 17])
def test_windows_are_pieces_of_long_documents(long_source: str, long_documents: list[str], seed: int) -> None:
    made = build(long_source, samples=8, length=39, seed=seed)
    assert made.rule == "random-window"
    assert made.documents == 8
    assert made.ids.shape == (8, 39)
    assert made.ids.dtype == torch.int64
    assert made.ids.device.type == "cpu"
    used = []
    for window in made.ids.tolist():
        (home,) = homes(window, long_documents)
        assert len(encode(long_documents[home])) > 39
        used.append(home)
    assert len(set(used)) == len(used), "each document at most once"


def test_as_many_windows_as_documents(long_source: str, long_documents: list[str]) -> None:
    made = build(long_source, samples=12, length=39)
    used = {homes(window, long_documents)[0] for window in made.ids.tolist()}
    assert used == set(range(0, 36, 3))


def test_a_document_must_be_longer_than_the_window(long_source: str) -> None:
    """Of the 12 documents, 11 have more than 40 tokens; at 12 windows the rule changes."""
    assert build(long_source, samples=11, length=40).rule == "random-window"
    assert build(long_source, samples=12, length=40).rule == "packed"


def test_windows_and_documents_are_drawn_at_random(tmp_path: Path) -> None:
    documents = [prose(60, seed=i) for i in range(40)]
    source = write_rows(tmp_path / "a.jsonl", documents)
    starts, used = [], []
    for seed in range(10):
        for window in build(source, samples=4, length=20, seed=seed).ids.tolist():
            (home,) = homes(window, documents)
            ids = encode(documents[home])
            starts.append(next(i for i in range(41) if ids[i : i + 20] == window))
            used.append(home)
    assert min(starts) < 8
    assert max(starts) > 32
    assert len(set(starts)) > 15
    assert len(set(used)) > 20


def test_the_seed_decides(long_source: str) -> None:
    made = [build(long_source, samples=5, length=30, seed=seed) for seed in (0, 1, 2, 0, 1)]
    assert torch.equal(made[0].ids, made[3].ids)
    assert torch.equal(made[1].ids, made[4].ids)
    assert made[0].sha256 == made[3].sha256
    assert len({m.sha256 for m in made}) == 3


def test_the_seed_decides_where_a_single_document_is_cut(tmp_path: Path) -> None:
    text = prose(2000, seed=9)
    source = tmp_path / "one.txt"
    source.write_text(text)
    stream = encode(text)
    made = {seed: build(str(source), samples=5, length=30, seed=seed) for seed in (0, 1, 2)}
    assert len({m.sha256 for m in made.values()}) == 3
    for m in made.values():
        ids = m.ids.flatten().tolist()
        assert (m.rule, m.documents) == ("packed", 1)
        assert any(stream[i : i + len(ids)] == ids for i in range(len(stream))), "one piece of the document"
    assert made[0].ids.flatten().tolist() == stream[:150]
    with pytest.raises(DataError, match="--samples is 9999"):
        build(str(source), samples=9999, length=30, seed=1)


def test_special_tokens_do_not_enter(long_source: str, short_source: str) -> None:
    assert not (build(long_source, samples=8, length=20).ids < 4).any()
    assert set(build(short_source, samples=3, length=20).ids.flatten().tolist()) & {0, 1, 3} == set()


@pytest.mark.parametrize("kind", ["long", "short", "self"])
def test_global_random_states_are_neither_read_nor_changed(kind: str, long_source: str, short_source: str) -> None:
    source = {"long": long_source, "short": short_source, "self": "self"}[kind]
    arguments: dict[str, Any] = {"model": tiny_model()} if kind == "self" else {}
    made = []
    for state in (11, 12):
        random.seed(state)
        np.random.seed(state)
        torch.manual_seed(state)
        before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
        made.append(build(source, samples=3, length=12, seed=5, **arguments).ids)
        assert random.getstate() == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])
        assert np.random.get_state()[1].tolist() == before[2]
    assert torch.equal(*made)


# --- packed -----------------------------------------------------------------------------------------------------------


def packed(documents: list[str], samples: int, length: int) -> tuple[list[list[int]], int]:
    """Every document, then the end-of-text token, then the next; cut from the beginning."""
    stream: list[int] = []
    used = 0
    for text in documents:
        if len(stream) < samples * length:
            stream += ([END] if used else []) + encode(text)
            used += 1
    return [stream[i * length : (i + 1) * length] for i in range(samples)], used


@pytest.mark.parametrize(("samples", "length"), [(1, 20), (2, 11), (4, 30), (6, 24)])
def test_packed_in_order(short_source: str, short_documents: list[str], samples: int, length: int) -> None:
    made = build(short_source, samples=samples, length=length)
    windows, used = packed(short_documents, samples, length)
    assert made.rule == "packed"
    assert made.ids.tolist() == windows
    assert made.documents == used


def test_packed_leaves_out_empty_documents(tmp_path: Path, short_documents: list[str]) -> None:
    source = write_rows(tmp_path / "a.jsonl", [x for text in short_documents for x in ("", text, " \n")])
    assert build(source, samples=4, length=30).ids.tolist() == packed(short_documents, 4, 30)[0]


def test_packed_by_other_seeds_is_another_order_of_whole_documents(
    short_source: str, short_documents: list[str]
) -> None:
    made = {seed: build(short_source, samples=4, length=30, seed=seed) for seed in (0, 1, 2)}
    assert len({m.sha256 for m in made.values()}) == 3
    assert torch.equal(made[1].ids, build(short_source, samples=4, length=30, seed=1).ids)
    for m in made.values():
        assert m.rule == "packed"
        stream = m.ids.flatten().tolist()
        pieces: list[list[int]] = [[]]
        for token in stream:
            if token == END:
                pieces.append([])
            else:
                pieces[-1].append(token)
        assert len(pieces) == m.documents
        whole = [encode(text) for text in short_documents]
        assert all(piece in whole for piece in pieces[:-1])
        assert len({tuple(piece) for piece in pieces[:-1]}) == len(pieces) - 1, "none twice"
        assert any(w[: len(pieces[-1])] == pieces[-1] for w in whole)


def test_one_long_text_file_is_cut_in_order(text_file: Path) -> None:
    made = build(str(text_file), samples=5, length=100)
    assert made.rule == "packed"
    assert made.documents == 1
    assert made.ids.flatten().tolist() == encode(text_file.read_text(encoding="utf-8"))[:500]


def test_one_window_from_one_long_document_is_random(text_file: Path) -> None:
    made = build(str(text_file), samples=1, length=100)
    assert made.rule == "random-window"
    assert homes(made.ids[0].tolist(), [text_file.read_text(encoding="utf-8")]) == [0]


def test_exactly_enough_tokens(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(prose(60))
    made = build(str(path), samples=3, length=20)
    assert made.ids.flatten().tolist() == encode(prose(60))
    with pytest.raises(DataError, match="2 windows of 21 tokens, but --samples is 3"):
        build(str(path), samples=3, length=21)


def test_wide_characters_do_not_hide_a_long_document(tmp_path: Path) -> None:
    """A tokenizer may make several tokens of one character; counting characters would drop such documents."""

    class ByteTokenizer:
        all_special_ids = ()
        unk_token_id = None

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": list(text.encode())}

    source = write_rows(tmp_path / "a.jsonl", ["漢字" * 10])  # 20 characters, 60 bytes
    made = build_calibration(
        source,
        ByteTokenizer(),
        samples=1,
        sequence_length=50,
        seed=0,
        end_of_text_id=0,  # type: ignore[arg-type]
    )
    assert made.rule == "random-window"


# --- too little text --------------------------------------------------------------------------------------------------


def test_shorter_than_one_sequence(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(prose(19))
    says = f"{re.escape(str(path))} is shorter than one sequence: 19 tokens, but --sequence-length is 20"
    with pytest.raises(DataError, match=says):
        build(str(path), samples=1, length=20)


def test_fewer_windows_than_samples(short_source: str, short_documents: list[str]) -> None:
    tokens = sum(len(encode(text)) for text in short_documents) + len(short_documents) - 1
    says = f"gives {tokens // 30} windows of 30 tokens, but --samples is 128; lower --samples or --sequence-length"
    with pytest.raises(DataError, match=says):
        build(short_source, samples=128, length=30)


def test_beyond_the_models_positions(text_file: Path) -> None:
    with pytest.raises(DataError, match="sequence_length 257 is beyond the model's 256 positions; give 256 or less"):
        build(str(text_file), samples=1, length=257, context_length=POSITIONS)
    with pytest.raises(DataError, match="beyond the model's 256 positions"):
        build("self", samples=1, length=257, context_length=POSITIONS, model=tiny_model())
    assert build(str(text_file), samples=1, length=256, context_length=POSITIONS).ids.shape == (1, 256)


def test_self_needs_a_model() -> None:
    with pytest.raises(DataError, match="'self' needs the dense model"):
        build("self", samples=1, length=8)


# --- the model's own text ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 16, 19])
def test_generated_windows(samples: int) -> None:
    model = tiny_model()
    events: list[Event] = []
    made = build("self", samples=samples, length=24, model=model, on_event=events.append)
    assert made.rule == "generated"
    assert made.ids.shape == (samples, 24)
    assert made.ids.dtype == torch.int64
    assert (made.ids[:, 0] == END).all()
    assert 0 <= int(made.ids.min()) <= int(made.ids.max()) < model.config.vocab_size
    assert [event.done for event in events] == [*range(16, samples, 16), samples]
    assert all(event.kind == "progress" and event.total == samples for event in events)
    assert events[-1].tokens == samples * 24


def test_generated_windows_come_from_the_seed() -> None:
    model = tiny_model()
    made = [build("self", samples=3, length=16, seed=seed, model=model).ids for seed in (0, 0, 1)]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    assert len({tuple(row) for row in made[0].tolist()}) == 3, "samples differ"


def test_generated_tokens_follow_the_models_own_distribution() -> None:
    """Temperature 1, nothing cut off: the second token's frequencies are the model's probabilities."""
    model = tiny_model(vocab_size=12)
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([[END]])).logits[0, -1].double().softmax(-1)
    expected = expected.clone()
    expected[END] = 0  # a window may not end early
    expected /= expected.sum()
    made = build("self", samples=1600, length=2, model=model)
    found = torch.bincount(made.ids[:, 1], minlength=12).double() / 1600
    assert found[END] == 0
    spread = (expected * (1 - expected) / 1600).sqrt()
    assert ((found - expected).abs() <= 5 * spread + 1e-12).all()


def test_generation_ignores_what_the_checkpoint_recommends() -> None:
    """A generation config with a low temperature or a penalty would calibrate on other text than the model's own."""
    plain, tuned = tiny_model(), tiny_model()
    tuned.generation_config.temperature = 0.1
    tuned.generation_config.top_k = 1
    tuned.generation_config.top_p = 0.1
    tuned.generation_config.do_sample = False
    tuned.generation_config.repetition_penalty = 5.0
    tuned.generation_config.no_repeat_ngram_size = 2
    tuned.generation_config.max_length = 5
    made = [build("self", samples=3, length=16, model=model).ids for model in (plain, tuned)]
    assert torch.equal(*made)


# --- what is recorded -------------------------------------------------------------------------------------------------


def calibration(ids: Any) -> Calibration:
    return Calibration(torch.tensor(ids), "here.txt", "packed", 3, 2)


def test_hash_by_hand() -> None:
    expected = hashlib.sha256(b"(2, 3)" + struct.pack("<6q", 1, 2, 3, 4, 5, 60000)).hexdigest()
    assert calibration([[1, 2, 3], [4, 5, 60000]]).sha256 == expected
    assert Calibration(torch.tensor([[1, 4], [2, 5], [3, 60000]]).T, "x", "packed", 0, 1).sha256 == expected


def test_hash_changes_with_ids_order_and_shape() -> None:
    kinds = [
        [[1, 2], [3, 4]],
        [[1, 2], [4, 3]],
        [[3, 4], [1, 2]],
        [[1, 2, 3, 4]],
        [[1], [2], [3], [4]],
        [[1, 2], [3, 5]],
    ]
    assert len({calibration(ids).sha256 for ids in kinds}) == len(kinds)


def test_to_dict() -> None:
    made = calibration([[1, 2, 3], [4, 5, 6]])
    assert json.loads(json.dumps(made.to_dict())) == {
        "source": "here.txt",
        "rule": "packed",
        "seed": 3,
        "documents": 2,
        "samples": 2,
        "sequence_length": 3,
        "tokens": 6,
        "bos_ids": [],
        "sha256": made.sha256,
    }


def test_events_of_random_windows(long_source: str) -> None:
    events: list[Event] = []
    build(long_source, samples=6, length=39, on_event=events.append)
    assert [(event.phase, event.done, event.total) for event in events] == [("calibration", i, 6) for i in range(1, 7)]
