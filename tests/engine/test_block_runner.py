"""Batches, where hidden states are kept, and what happens when the device runs out of memory."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import thanos
from thanos.engine import block_runner as passes
from thanos.engine.activations import Activations
from thanos.engine.block_calls import BlockCalls
from thanos.engine.block_runner import Passes, Step
from thanos.errors import RecipeError, ResourceError

SAMPLES, LENGTH = 8, 24


def recipe(text: Path, **changes: Any) -> thanos.Recipe:
    settings = {"calibration": str(text), "samples": SAMPLES, "sequence_length": LENGTH, "device": "cpu"}
    return thanos.Recipe(**settings | changes)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    return (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


@pytest.mark.parametrize("targets", [(), ("layers.*", "lm_head")])
def test_the_place_of_the_activations_changes_nothing(
    targets: tuple[str, ...], tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    for tier in ("auto", "device", "host", "disk"):
        report = thanos.prune(tiny_llama, tmp_path / tier, recipe(text_file, targets=targets), activations=tier)
        assert report.execution["activations"] == ("disk" if tier == "disk" else "host")
        assert report.execution["batch"] == SAMPLES
        assert same(tmp_path / tier, tmp_path / "auto")
        assert {path.name for path in tmp_path.iterdir()} <= {"auto", "device", "host", "disk"}


def test_an_unknown_place_is_refused_before_anything_is_done(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="activations must be one of"):
        thanos.prune(tiny_llama, tmp_path / "out", recipe(text_file), activations="tape")
    assert not (tmp_path / "out").exists()


def batched(monkeypatch: pytest.MonkeyPatch, sequences: int) -> None:
    monkeypatch.setitem(passes.BATCH_TOKENS, "cpu", sequences * LENGTH)


class Device:
    """Runs out of memory where it is told to: in passes of more than ``room`` sequences, from the n-th forward pass on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int, after: int = 0) -> None:
        self.sizes: list[tuple[int, int]] = []
        original, passed = BlockCalls.run, 0

        def run(calls: BlockCalls, index: int, hidden: Tensor, first: int, **how: bool) -> Tensor:
            nonlocal passed
            passed += 1
            if len(hidden) > room and passed > after:
                original(
                    calls, index, hidden, first, **how
                )  # memory runs out late: the hooks have seen this batch already
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            self.sizes.append((index, len(hidden)))
            return original(calls, index, hidden, first, **how)

        monkeypatch.setattr(BlockCalls, "run", run)


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_out_of_memory_halves_the_batch_and_redoes_the_statistics(
    tier: str, tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batched(monkeypatch, 2)
    thanos.prune(tiny_llama, tmp_path / "small", recipe(text_file))
    batched(monkeypatch, 8)
    events: list[thanos.Event] = []
    device = Device(monkeypatch, room=2)
    report = thanos.prune(tiny_llama, tmp_path / "out", recipe(text_file), activations=tier, on_event=events.append)
    assert same(tmp_path / "out", tmp_path / "small")  # what the failed batches had added is gone
    assert {size for _, size in device.sizes} == {2}
    lines = [
        "out of memory on the device: batches of 8 sequences become batches of 4",
        "out of memory on the device: batches of 4 sequences become batches of 2",
    ]
    assert [e.message for e in events if e.kind == "note"] == lines
    assert report.warnings == lines
    assert report.execution["batch"] == 2
    assert {layer.tokens for layer in report.layers} == {SAMPLES * LENGTH}


def test_out_of_memory_while_propagating_goes_on_from_the_failed_batch(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thanos.prune(tiny_llama, tmp_path / "plain", recipe(text_file))
    batched(monkeypatch, 2)
    device = Device(monkeypatch, room=1, after=5)  # 4 batches of statistics, then one of the propagating pass
    report = thanos.prune(tiny_llama, tmp_path / "out", recipe(text_file))
    assert [size for index, size in device.sizes if index == 0] == [2] * 5 + [1] * 6
    assert report.execution["batch"] == 1
    a, b = weights(tmp_path / "plain"), weights(tmp_path / "out")
    for name in a:  # batches change rounding, nothing else
        assert torch.equal(a[name] == 0, b[name] == 0), name
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


def test_the_failed_batch_is_gone_before_memory_is_given_back(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the statistics pass, then in the propagating one."""
    calls, failed, alive = 0, [], []
    original = BlockCalls.run

    def run(block: BlockCalls, index: int, hidden: Tensor, first: int, **how: bool) -> Tensor:
        nonlocal calls
        calls += 1
        found = original(block, index, hidden, first, **how)
        if calls in (1, 4):  # of 8 sequences; then of 4, after two batches of them for the statistics
            failed.append(weakref.ref(found))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return found

    monkeypatch.setattr(BlockCalls, "run", run)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(any(ref() is not None for ref in failed)))
    report = thanos.prune(tiny_llama, tmp_path / "out", recipe(text_file))
    assert (alive, report.execution["batch"]) == ([False, False], 2)


def test_when_one_sequence_does_not_fit_the_run_stops(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Device(monkeypatch, room=0)
    with pytest.raises(ResourceError, match=r"one sequence of 24 tokens: lower --sequence-length"):
        thanos.prune(tiny_llama, tmp_path / "out", recipe(text_file))
    assert not (tmp_path / "out").exists()


def test_the_statistics_pass_ends_before_the_last_layers_own_product(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batched(monkeypatch, 1)
    ran: dict[str, int] = {}
    original = nn.Linear.forward

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        ran[str(tuple(self.weight.shape))] = ran.get(str(tuple(self.weight.shape)), 0) + 1
        return original(self, x)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    thanos.prune(tiny_llama, tmp_path / "out", recipe(text_file))
    # 8 sequences, 3 blocks; the last block is not propagated. gate and up run in every pass; down in every propagating
    # one, and in the first batch of the statistics, where the order of the layers is learned.
    assert ran["(64, 32)"] == 2 * (3 + 2) * 8
    assert ran["(32, 64)"] == 2 * 8 + 3


def test_a_batch_given_by_an_earlier_run_is_kept(tmp_path: Path) -> None:
    model = Stack()
    ids = torch.arange(12).view(6, 2) % 5
    run = Passes(model, list(model.layers), ids, torch.device("cpu"), tmp_path)
    run.batch = 4
    with torch.inference_mode():
        run.record()
        assert list(run.propagate(0)) == [Step(4), Step(6)]
    assert (run.batch, run.starts, run.shape, run.tier) == (4, [(0, 4)], (6, 2), "host")
    run.close()


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.linear(hidden_states)


def test_states_on_the_device_move_to_the_host_when_a_solve_needs_the_room(tmp_path: Path) -> None:
    model = Stack()
    ids = torch.arange(12).view(6, 2) % 5
    run = Passes(model, list(model.layers), ids, torch.device("cpu"), tmp_path)
    with torch.inference_mode():
        run.record()
        assert run.spill() is None  # they are on the host already
        assert isinstance(run._states, Activations)
        before = torch.cat([hidden for _, hidden in run._states.batches(6)])
        run._states.tier = "device"
        line = run.spill()
        assert line == "out of memory on the device: the activations move to the host"
        assert run.tier == "host"
        assert torch.equal(torch.cat([hidden for _, hidden in run._states.batches(6)]), before)
        assert list(run.propagate(0)) == [Step(6)]
    run.close()
