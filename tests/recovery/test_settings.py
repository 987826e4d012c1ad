"""What is trained (``train``), and the learning rate that is chosen (``rate = auto``)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import thanos
from helpers import save_tiny
from recovering import prune, read, settings
from thanos.recovery.rate import rate_for

pytest.importorskip("accelerate", reason="the extra recover is not installed")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("train", ["blocks", "linear"])
def test_what_is_not_trained_keeps_its_bytes(train: str, tied: bool, text_file: Path, tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "dense", dtype=torch.bfloat16, tie_word_embeddings=tied)
    pruned = prune(dense, tmp_path / "out", text_file)
    report = thanos.recover(pruned, tmp_path / "out2", dense=dense, recipe=settings(text_file, train=train))
    assert report.best_step > 0
    before, after = read(pruned), read(tmp_path / "out2")
    for name, tensor in before.items():
        trained = "_proj.weight" in name if train == "linear" else ".layers." in name
        # A norm's gain of 1 moves by less than a step of bfloat16.
        if trained and "norm" not in name:
            assert not torch.equal(after[name], tensor), name
        elif not trained:
            assert torch.equal(after[name], tensor), name


def test_a_part_is_trained_with_the_gradients_of_the_whole(
    recovered: tuple[Path, thanos.RecoveryReport], pruned: Path, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    """The other weights stand still, so the loss falls by less in the first epoch, but it falls."""
    report = thanos.recover(pruned, tmp_path / "o", dense=tiny_llama, recipe=settings(text_file, train="linear"))
    assert recovered[1].held_out_after < report.held_out_after < report.held_out_before
    assert report.recipe["train"] == report.train == "linear"


def test_where_pruning_set_weights_to_zero_the_linear_layers_train(
    varied: tuple[Path, thanos.RecoveryReport], recovered: tuple[Path, thanos.RecoveryReport]
) -> None:
    assert varied[1].recipe["train"] == "auto"
    assert varied[1].train == "linear"
    assert recovered[1].train == "all"


@pytest.mark.parametrize(
    ("train", "sparse", "parts"), [("auto", True, "linear"), ("auto", False, "blocks"), ("all", True, "all")]
)
def test_the_parts_follow_from_what_pruning_changed(train: str, sparse: bool, parts: str, text_file: Path) -> None:
    assert settings(text_file, train=train).parts(sparse=sparse) == parts


@pytest.mark.parametrize("train", ["blocks", "linear"])
def test_a_part_resumed_equals_uninterrupted(
    train: str, pruned: Path, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    def stop(event: thanos.Event) -> None:
        if event.kind == "progress" and event.phase == "train" and event.done == 5:
            raise KeyboardInterrupt

    recipe = settings(text_file, train=train, rate="auto")
    thanos.recover(pruned, tmp_path / "whole", dense=tiny_llama, recipe=recipe)
    with pytest.raises(KeyboardInterrupt):
        thanos.recover(pruned, tmp_path / "out2", dense=tiny_llama, recipe=recipe, on_event=stop)
    thanos.recover(pruned, tmp_path / "out2", dense=tiny_llama, recipe=recipe, resume=True)
    one, other = (tmp_path / name / "model.safetensors" for name in ("whole", "out2"))
    assert one.read_bytes() == other.read_bytes()


def test_the_rate_grows_with_the_loss_between_two_bounds() -> None:
    rates = [rate_for(loss, 0.26) for loss in (0.0, 0.22, 0.4, 0.66, 1.0, 1.4, 50.0)]
    assert rates == sorted(rates)
    assert rates == [2.6e-5, 2.5e-4, 4e-4, 6e-4, 8.3e-4, 1e-3, 1e-3]
    assert rate_for(0.08, 0.025) == 1.1e-5
    assert rate_for(-1e-9, 0.26) == rates[0]  # the divergence of equal models, after rounding


def test_the_chosen_rate_is_recorded_and_is_that_of_the_loss_before(
    pruned: Path, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    report = thanos.recover(pruned, tmp_path / "auto", dense=tiny_llama, recipe=settings(text_file, rate="auto"))
    named = [tensor for name, tensor in read(pruned).items() if name.endswith("_proj.weight")]
    kept = torch.cat([tensor[tensor != 0] for tensor in named]).double()
    assert report.rate == rate_for(report.held_out_before, kept.square().mean().sqrt().item())
    assert report.recipe["rate"] == "auto"
    assert f"rate {report.rate:g}" in (tmp_path / "auto" / "README.md").read_text()
    given = thanos.recover(pruned, tmp_path / "given", dense=tiny_llama, recipe=settings(text_file, rate=report.rate))
    assert given.rate == report.rate
    one, other = (tmp_path / name / "model.safetensors" for name in ("auto", "given"))
    assert one.read_bytes() == other.read_bytes()


def test_auto_is_the_default_and_a_number_may_be_a_text() -> None:
    plain = thanos.RecoveryRecipe()
    assert (plain.rate, plain.train, plain.vary) == ("auto", "auto", True)
    assert thanos.RecoveryRecipe(rate="3e-4").rate == 3e-4


def test_a_report_of_an_earlier_version_has_no_rate_and_no_parts_of_its_own(
    recovered: tuple[Path, thanos.RecoveryReport],
) -> None:
    stored = json.loads((recovered[0] / "recovery.json").read_bytes())
    assert (stored.pop("rate"), stored.pop("train")) == (1e-3, "all")
    report = thanos.RecoveryReport.from_dict(stored)
    assert report.rate is report.train is None
