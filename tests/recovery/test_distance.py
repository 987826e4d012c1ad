"""The loss of recovery and its gradient, against a reference that holds all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import ARCHITECTURES, MIXTURES, tiny_model, windows
from thanos.recovery.distance import Distillation, SplitModel


def pair(architecture: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    student, teacher = tiny_model(architecture, seed=1, dtype=dtype), tiny_model(architecture, seed=2, dtype=dtype)
    return student.requires_grad_(True), teacher.requires_grad_(False)


def reference(student: Any, teacher: Any, ids: Tensor) -> Tensor:
    """Mean over tokens of Σ p (log p − log q), written out; p from the dense model, q from the pruned one."""
    own, dense = student(input_ids=ids).logits.double(), teacher(input_ids=ids).logits.double()
    q = own - own.logsumexp(-1, keepdim=True)
    p = dense - dense.logsumexp(-1, keepdim=True)
    return (p.exp() * (p - q)).sum(-1).mean()


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MIXTURES])
def test_loss_and_gradient_are_those_of_the_reference(architecture: str) -> None:
    # Fused mixtures of experts have no kernel in float64.
    exact = architecture not in MIXTURES
    student, teacher = pair(architecture, torch.float64 if exact else torch.float32)
    ids = windows(3, 32)
    expected = reference(student, teacher, ids)
    expected.backward()
    wanted = gradients(student)
    student.zero_grad(set_to_none=True)
    loss = Distillation(student, teacher, chunk=13)(ids)  # 96 tokens: seven chunks of 13 and one of 5
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6 if exact else 1e-4)
    found = gradients(student)
    assert found.keys() == wanted.keys()
    scale = max(float(one.abs().max()) for one in wanted.values())
    for name, gradient in wanted.items():
        # Some modules (norms, routers, rotary embeddings) compute in float32 in every model of transformers.
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=(1e-6 if exact else 1e-4) * scale, msg=name)
    assert all(p.grad is None for p in teacher.parameters())


def test_the_gradient_against_the_closed_form_at_the_logits() -> None:
    """∂KL/∂logits = (q − p)/tokens; the gradient of the head's weight is its transpose times the hidden states."""
    student, teacher = pair("llama")
    ids = windows(2, 24)
    Distillation(student, teacher, chunk=10)(ids).backward()
    with torch.no_grad():
        hidden = student.model(input_ids=ids).last_hidden_state.flatten(0, 1)
        q = student(input_ids=ids).logits.softmax(-1).flatten(0, 1)
        p = teacher(input_ids=ids).logits.softmax(-1).flatten(0, 1)
    expected = (q - p).T @ hidden / ids.numel()
    torch.testing.assert_close(student.lm_head.weight.grad, expected, rtol=1e-6, atol=1e-9)


def test_equal_models_have_no_distance_and_no_gradient() -> None:
    student, teacher = tiny_model("llama").requires_grad_(True), tiny_model("llama")
    loss = Distillation(student, teacher)(windows(2, 16))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert max(float(gradient.abs().max()) for gradient in gradients(student).values()) < 1e-6


def test_the_student_may_be_smaller_than_the_teacher() -> None:
    student = tiny_model(
        "llama", seed=1, hidden_size=16, intermediate_size=24, num_hidden_layers=2, dtype=torch.float64
    )
    teacher = tiny_model("llama", seed=2, dtype=torch.float64)
    ids = windows(2, 20)
    loss = Distillation(student.requires_grad_(True), teacher, chunk=7)(ids)
    assert loss.item() == pytest.approx(reference(student, teacher, ids).item(), rel=1e-9)


def test_no_tensor_as_large_as_all_logits_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = pair("llama", torch.float32)
    seen: list[int] = []
    original = SplitModel.logits

    def watch(self: SplitModel, hidden: Tensor) -> Tensor:
        seen.append(len(hidden))
        return original(self, hidden)

    monkeypatch.setattr(SplitModel, "logits", watch)
    Distillation(student, teacher, chunk=16)(windows(4, 32)).backward()
    # Eight chunks, two models, and no second time in the backward pass.
    assert max(seen) == 16
    assert len(seen) == 2 * 8


def test_dropout_stays_off() -> None:
    student, teacher = pair("gpt-2", torch.float32)
    module, ids = Distillation(student, teacher).train(), windows(2, 16)
    assert not any(one.training for one in module.modules())
    assert module(ids).item() == module(ids).item()
