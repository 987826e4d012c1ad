"""The dense decoder's outputs: kept or computed in each pass, the training is the same to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import thanos
from helpers import MIXTURES, tiny_model, windows
from recovering import settings
from thanos.engine.distributed import SINGLE
from thanos.recovery import dense_outputs
from thanos.recovery.distance import Distillation

pytest.importorskip("accelerate", reason="the extra recover is not installed")

CPU = torch.device("cpu")


@pytest.mark.parametrize("architecture", ["llama", "gpt-2", "opt-350m", "gemma-2", *MIXTURES])
def test_loss_and_gradient_are_those_without_kept_outputs(architecture: str) -> None:
    student, teacher = tiny_model(architecture, seed=1).requires_grad_(True), tiny_model(architecture, seed=2)
    ids, numbers = windows(5, 16), torch.tensor([3, 0])
    module = Distillation(student, teacher)
    plain = module(ids[numbers])
    plain.backward()
    wanted = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad(set_to_none=True)
    told: list[int] = []
    assert dense_outputs.keep_outputs(module, ids, 2, CPU, SINGLE, told.append)
    assert told == [1, 2, 3, 4, 5]
    loss = module(ids[numbers], numbers)
    loss.backward()
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-7)
    for name, p in student.named_parameters():
        if name in wanted:
            torch.testing.assert_close(p.grad, wanted[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_dense_decoder_is_freed_and_its_head_is_not() -> None:
    for tied in (False, True):
        teacher = tiny_model("llama", seed=2, tie_word_embeddings=tied)
        module = Distillation(tiny_model("llama", seed=1, tie_word_embeddings=tied), teacher)
        held = sum(p.nbytes for p in teacher.parameters())
        freed = module.teacher.decoder_bytes
        dense_outputs.keep_outputs(module, windows(2, 16), 1, CPU, SINGLE, lambda done: None)
        left = {name: p for name, p in teacher.named_parameters() if p.device.type != "meta"}
        assert list(left) == (["model.embed_tokens.weight"] if tied else ["lm_head.weight"])
        assert sum(p.nbytes for p in left.values()) == held - freed


def test_a_run_that_cannot_keep_them_gives_the_same_bytes(
    recovered: tuple[Path, thanos.RecoveryReport],
    pruned: Path,
    tiny_llama: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []
    original = dense_outputs.keep_outputs

    def watch(*args: Any) -> bool:
        calls.append(original(*args))
        return calls[-1]

    monkeypatch.setattr("thanos.recovery.trainer.keep_outputs", watch)
    monkeypatch.setattr(dense_outputs, "SPARE_BYTES", {"cpu": -(1 << 40)})
    report = thanos.recover(pruned, tmp_path / "out2", dense=tiny_llama, recipe=settings(text_file))
    assert calls == [False]
    assert report.history == recovered[1].history
    assert (tmp_path / "out2" / "model.safetensors").read_bytes() == (recovered[0] / "model.safetensors").read_bytes()


def test_the_parts_are_timed(recovered: tuple[Path, thanos.RecoveryReport]) -> None:
    phases = recovered[1].phases
    parts = ["load", "calibration", "dense", "train", "held-out", "checkpoint", "finish"]
    assert sorted(phases) == sorted(parts)
    assert recovered[1].seconds == pytest.approx(sum(phase.seconds for phase in phases.values()))
