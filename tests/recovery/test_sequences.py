"""The text of each epoch: the same in all of them, or varied."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import thanos
from recovering import VARIED, settings, vary
from thanos.calibration.making import make_calibration
from thanos.calibration.windows import begin_windows
from thanos.model.source import resolve_model
from thanos.recipe.repair import SEGMENT
from thanos.recovery.recipe import RecoveryRecipe
from thanos.recovery.sequences import Sequences, recut, replace_some

BOS = (7,)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distinct(count: int, length: int, bos: tuple[int, ...]) -> Tensor:
    """Sequences in which each token of the text has an id of its own, from 100."""
    text = 100 + torch.arange(count * (length - len(bos)))
    return begin_windows(text.view(count, -1), bos)


def all_ids(sequences: Sequences) -> Tensor:
    return torch.stack([sequences[index]["ids"] for index in range(len(sequences))])


def recipe(**changes: Any) -> RecoveryRecipe:
    return RecoveryRecipe(samples=6, held_out=2, epochs=3, **changes)


shapes = pytest.mark.parametrize(("count", "length"), [(5, 1024), (3, 523), (4, 300), (6, 33), (1, 256), (2, 3)])
begins = pytest.mark.parametrize("bos", [(), BOS, (7, 9)])
segments = pytest.mark.parametrize("segment", [2, SEGMENT, 700, 5000])


@shapes
@begins
@segments
def test_recutting_keeps_every_token_and_bos(count: int, length: int, bos: tuple[int, ...], segment: int) -> None:
    ids = distinct(count, length, bos)
    found = recut(ids, bos, generator(3), segment)
    assert found.shape == ids.shape
    assert torch.equal(found.flatten().sort().values, ids.flatten().sort().values)
    assert (found[:, : len(bos)] == torch.tensor(bos)).all()
    assert not torch.isin(found[:, len(bos) :], torch.tensor(bos, dtype=torch.long)).any()


@shapes
@begins
@segments
def test_segments_move_as_a_whole(count: int, length: int, bos: tuple[int, ...], segment: int) -> None:
    """Two neighbours in the text are neighbours still, except at the ends of segments and of the text."""
    ids = distinct(count, length, bos)
    begin = len(bos)
    stream = recut(ids, bos, generator(1), segment)[:, begin:].flatten()
    size = min(segment, length - begin)
    breaks = int((stream[1:] - stream[:-1] != 1).sum())
    assert breaks <= -(-len(stream) // size)


@begins
def test_five_tokens_of_a_hundred_are_replaced_by_tokens_of_the_text(bos: tuple[int, ...]) -> None:
    ids = begin_windows(100 + torch.arange(100 * 1000).view(100, 1000) % 77, bos)
    found = replace_some(ids, bos, generator(2))
    assert set(found.unique().tolist()) == set(ids.unique().tolist())
    assert (found[:, : len(bos)] == torch.tensor(bos)).all()
    assert not torch.isin(found[:, len(bos) :], torch.tensor(bos, dtype=torch.long)).any()
    share = float((found[:, -1000:] != ids[:, -1000:]).double().mean())
    # Drawn from 77 tokens, one in 77 is the token itself. Six standard deviations of 100,000 draws.
    assert share == pytest.approx(0.05 * 76 / 77, abs=6 * (0.05 * 0.95 / 100_000) ** 0.5)


@shapes
@begins
def test_an_epoch_is_that_of_a_slow_reference(count: int, length: int, bos: tuple[int, ...]) -> None:
    ids = distinct(count, length, bos)
    sequences = Sequences(ids, bos, recipe(seed=5, batch=1))
    for epoch in range(3):
        draw = generator(1_000_003 * 5 + epoch)
        order = torch.randperm(count, generator=draw)
        expected = torch.tensor(vary(ids.tolist(), bos, draw))[order]
        found = torch.stack([sequences[epoch * count + place]["ids"] for place in range(count)])
        assert torch.equal(found, expected), epoch


def test_seed_and_epoch_alone_determine_the_text() -> None:
    """Read in any order, as a resumed run does, in which other random numbers were drawn."""
    ids = distinct(4, 1024, BOS)
    whole, again = (Sequences(ids, BOS, recipe()) for _ in range(2))
    expected = all_ids(whole)
    torch.rand(3)
    for index in (9, 2, 11, 3, 5):
        assert torch.equal(again[index]["ids"], expected[index]), index
    epochs = expected.split(4)
    assert all(not torch.equal(epochs[a], epochs[b]) for a, b in ((0, 1), (1, 2), (0, 2)))
    assert not torch.equal(all_ids(Sequences(ids, BOS, recipe(seed=1))), expected)


def test_an_unvaried_text_is_the_same_in_each_epoch() -> None:
    ids = distinct(4, 64, BOS)
    sequences = Sequences(ids, BOS, recipe(vary=False))
    items = [sequences[index] for index in range(len(sequences))]
    for epoch in range(3):
        numbers = [int(item["numbers"]) for item in items[4 * epoch : 4 * epoch + 4]]
        assert sorted(numbers) == [0, 1, 2, 3]
        assert all(torch.equal(item["ids"], ids[int(item["numbers"])]) for item in items)


def test_the_given_tokens_are_not_changed() -> None:
    ids = distinct(4, 64, BOS)
    before = ids.clone()
    all_ids(Sequences(ids, BOS, recipe()))
    assert torch.equal(ids, before)


def test_two_processes_have_the_same_text() -> None:
    code = """
import hashlib, torch
from thanos.recovery.recipe import RecoveryRecipe
from thanos.recovery.sequences import Sequences
ids = torch.arange(4 * 600).view(4, 600)
one = Sequences(ids, (), RecoveryRecipe(samples=6, held_out=2, epochs=3))
print(hashlib.sha256(torch.stack([one[i]["ids"] for i in range(len(one))]).numpy().tobytes()).hexdigest())
"""
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    here = all_ids(Sequences(torch.arange(4 * 600).view(4, 600), (), recipe()))
    assert there.stdout.strip() == hashlib.sha256(here.numpy().tobytes()).hexdigest()


def test_the_held_out_sequences_are_neither_trained_on_nor_varied(
    pruned: Path, tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate", reason="the extra recover is not installed")
    from thanos.recovery.distance import Distillation

    seen: dict[bool, list[Tensor]] = {True: [], False: []}
    original = Distillation.forward

    def look(self: Distillation, ids: Tensor, numbers: Tensor | None = None) -> Tensor:
        assert self.outputs is None
        seen[torch.is_grad_enabled()].append(ids.clone())
        return original(self, ids, numbers)

    monkeypatch.setattr(Distillation, "forward", look)
    settled = settings(text_file, **VARIED)
    report = thanos.recover(pruned, tmp_path / "out2", dense=tiny_llama, recipe=settled)
    made = make_calibration(resolve_model(tiny_llama), settled.text, torch.device("cpu"), lambda event: None)
    assert len(made.bos_ids) == 1
    count = settled.trained
    measured, trained = torch.cat(seen[False]), torch.cat(seen[True])
    assert torch.equal(measured, made.ids[count:].repeat(4, 1))
    assert torch.equal(trained, all_ids(Sequences(made.ids[:count], made.bos_ids, settled)))
    assert (trained[:, 0] == made.bos_ids[0]).all()
    assert "dense" not in report.phases
